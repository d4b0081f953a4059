"""The learned part: budget encoding, scheduler heads and the sampling of plans. torch only, no transformers."""
