"""Ten 2021 papers on faces and video, reproduced in notebooks."""
__version__ = "0.1.0"
