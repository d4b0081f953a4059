"""The only room that knows transformers' model internals: attach, run, cache, generate, load and save."""
