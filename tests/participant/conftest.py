"""A tiny saved model for this folder's tests, made once, and what they do with adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Two Llama layers with random weights and a byte tokenizer, as a folder."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def draw():
    """Adapter values for a manifest: every tensor from a stream of its own, B as well as A."""

    def read_for(manifest, scale=0.1):
        streams = {
            spec.name: np.random.Generator(np.random.Philox(index))
            .standard_normal(spec.shape, dtype=np.float32)
            .__mul__(np.float32(scale))
            for index, spec in enumerate(manifest.tensors)
        }
        return streams.__getitem__

    return read_for
