"""From ``base.model`` to a frozen, quantised network and its tokenizer.

A folder is read in offline mode. A hub id is downloaded once, through huggingface_hub, and then
read as a folder: no other call here reaches the network. Weights come from safetensors only, and
code that comes with a model is never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from participant.model.fingerprint import weight_files
from participant.model.libraries import bitsandbytes, huggingface_hub, offline, transformers
from shared.base_model import HUB_ID, TOKENIZER_FILES
from shared.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from shared.config import BaseSection

# bitsandbytes' block for 4-bit weights, stated because it is part of the fingerprint.
NF4_BLOCK = 64
# RuntimeError: shapes that do not fit config.json, and a device that is too small.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    safetensors.SafetensorError,
)
_WANTED_FILES = [*TOKENIZER_FILES, "*.safetensors", "model.safetensors.index.json", "config.json"]


@dataclass(frozen=True)
class LoadedBase:
    """``network``: a causal language model whose parameters are all frozen, in eval mode."""

    folder: Path
    network: Any
    tokenizer: Any


def find_folder(model: str) -> Path:
    """The folder of a model given by hub id or by a path. Raises ModelError saying what to do.

    ``owner/name`` is a hub id here, whatever lies in the working directory: see ``located``.
    """
    if HUB_ID.fullmatch(model):
        return _download(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"base.model: {folder} holds no config.json; "
                "give the folder that save_pretrained wrote or that the hub calls a model"
            )
        return folder
    raise ModelError(
        f"base.model: {model!r} is not a folder here; give the path of a model folder "
        "or a hub id such as owner/name"
    )


def quantisation_facts(base: BaseSection) -> dict[str, Any]:
    """What decides the quantised values; part of the fingerprint."""
    if base.quantisation == "nf4":
        return {"kind": "nf4", "block": NF4_BLOCK, "double": False}
    return {"kind": base.quantisation}


def load_base(base: BaseSection, device: torch.device, compute_dtype: torch.dtype) -> LoadedBase:
    """Load, quantise and freeze.

    What is not quantised (embeddings, norms, head) stays in ``compute_dtype``. PEFT's
    ``prepare_model_for_kbit_training`` would make it float32, which doubles the embeddings' memory
    and, under autocast, casts the whole head back at every step. Raises ModelError.
    """
    folder = find_folder(base.model)
    weight_files(folder)
    with offline():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            # A pair, with output_loading_info; the library's annotations do not say so.
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            network, loading = load(
                folder,
                dtype=compute_dtype,
                device_map={"": device},
                use_safetensors=True,
                quantization_config=_quantisation(base, compute_dtype),
                output_loading_info=True,
            )
        except LOADING_ERRORS as error:
            raise ModelError(
                f"base.model: {base.model!r} cannot be loaded as a causal language model: {error}; "
                "fix or replace the folder"
            ) from error
    _check_whole(base.model, loading["missing_keys"])
    network.requires_grad_(requires_grad=False)
    network.eval()
    network.config.use_cache = False
    _keep_one_layout(network)
    return LoadedBase(folder, network, tokenizer)


def _quantisation(
    base: BaseSection, compute_dtype: torch.dtype
) -> transformers.BitsAndBytesConfig | None:
    settings: dict[str, object]
    match base.quantisation:
        case "nf4":
            settings = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": compute_dtype,
            }
        case "int8":
            # Threshold 0: no column of activations is kept in 16 bits, a choice made per batch.
            settings = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
        case "none":
            return None
    return transformers.BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]


def end_tokens(network: Any, tokenizer: Any) -> set[int]:
    """The model's own end tokens (there may be several) and the tokenizer's."""
    ends: set[int] = set()
    for end in (network.generation_config.eos_token_id, tokenizer.eos_token_id):
        ends.update(end if isinstance(end, list) else [end] if end is not None else [])
    return ends


def int8_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers whose ``training`` flag must stay on, on the CPU, for one arithmetic throughout.

    In eval mode bitsandbytes quantises their inputs as well, so that a held-out loss would belong
    to another model than the one that was trained; on the CPU it also takes ten times as long.
    The flag does nothing else in them: dropout is the adapter's.
    """
    return [m for m in network.modules() if isinstance(m, bitsandbytes.nn.modules.Linear8bitLt)]


def _check_whole(model: str, missing: Iterable[str]) -> None:
    """Refuse weights that lack tensors: transformers draws those at random and only warns."""
    names = sorted(missing)
    if names:
        raise ModelError(
            f"base.model: {model!r} lacks {len(names)} tensors of its architecture, "
            f"{names[0]} first; give a folder whose weights are whole"
        )


def _keep_one_layout(network: torch.nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights when it first meets them in eval mode.

    On CPUs with AVX512-BF16 it does so for good, rounding the scales to bfloat16 and switching to
    a kernel without a gradient: whoever evaluates and then trains would train through other
    weights, and what a site computes would depend on who used the base before it.
    """
    for module in network.modules():
        if isinstance(module, bitsandbytes.nn.modules.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _download(model: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_WANTED_FILES))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ModelError(
            f"base.model: {model!r} is not a folder here and cannot be downloaded from the hub "
            f"({type(error).__name__}); give the path of a model folder, or check the id and the "
            "network"
        ) from error
