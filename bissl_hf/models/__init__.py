"""Pretext models, and the model that holds both levels.

Importing it makes the configurations of the pretext models known to `AutoConfig`, so that a folder of any of them can
be loaded whatever else has been imported.
"""

from importlib import import_module

from .auto import PRETEXT_MODELS

for _model_type in PRETEXT_MODELS:
    import_module(f"{__name__}.configuration_{_model_type}")
