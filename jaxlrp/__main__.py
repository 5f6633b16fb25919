"""``python -m jaxlrp``."""

from .cli import main

raise SystemExit(main())
