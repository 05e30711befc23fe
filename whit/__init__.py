"""whit: make pretrained models small, and prove that what is left still behaves."""

__version__ = "0.1.0"
