"""Where the language model that the package carries lies (`model_name="demo"`)."""

from __future__ import annotations

from pathlib import Path

DEMO_NAME = "demo"


def demo_folder() -> Path:
    """The folder of the bundled language model, in Hugging Face format."""
    import lm_saes.demo

    return Path(lm_saes.demo.__file__).parent / "language_model"
