"""Relevance as pictures: heat maps, overlays, contact sheets, and photos to explain.

Colouring a map takes numpy alone; files and sheets take pillow (`pip install 'jaxlrp[demo]'`).
"""

from .heatmap import COLOUR_MAPS as COLOUR_MAPS
from .heatmap import box_smooth as box_smooth
from .heatmap import diverging as diverging
from .heatmap import limit_of as limit_of
from .heatmap import normalise as normalise
from .heatmap import overlay as overlay
from .heatmap import pool_channels as pool_channels
from .heatmap import save_png as save_png
from .heatmap import upscale as upscale
from .photos import MAX_PIXELS as MAX_PIXELS
from .photos import PhotoError as PhotoError
from .photos import load_photo as load_photo
from .photos import sample_photos as sample_photos
from .sheet import contact_sheet as contact_sheet
