"""Measure what the feed-forward layers of a pretrained transformer do.

What is public stands in `__init__.pyi`. torch and transformer_lens take seconds to import, so each name is
imported when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
