"""The only room that knows transformers' model internals: attach, run, cache, generate, load, save and convert.

Importing it makes the model types of this package known to transformers' Auto classes.
"""

from adallava.hosts import mipha

__all__ = ["mipha"]
