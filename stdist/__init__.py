"""stdist: distributed training of spatio-temporal forecasters."""

__version__ = "0.1.0"
