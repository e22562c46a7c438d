"""The requests and responses of diffusion_workers, generated from openapi/ez_diffusion_api.yaml."""
from . import models
from ._version import __version__

__all__ = ["__version__", "models"]
