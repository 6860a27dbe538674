"""litdiffusion: a research template for denoising diffusion models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litdiffusion.inference import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `import litdiffusion.diffusion` brings in torch and nothing more.
    if name == "load_model":
        from litdiffusion.inference import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
