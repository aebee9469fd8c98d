"""Base models made ready: a specification in the configuration becomes a transformers folder on disk.

``package:NAME`` converts the GGUF file that an installed Python package carries, once, to bf16 safetensors;
``tiny:SEED`` makes a seeded random Llama of some hundred kB; a folder is taken as it is; anything else is a
hub name. A prepared folder appears by one rename; two that prepare the same model wait for each other. The
conversion runs in a child process, so that its caller never holds torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from telemetry.process import hold

FORMAT = 1  # raise it when a conversion writes something different
FREE_BYTES = {"package": 700_000_000, "tiny": 5_000_000}  # the folder, its staging twin, and some air
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ModelUnavailable(RuntimeError):
    """The base model cannot be prepared; the message says what is missing and how to get it."""


def prepare_model(spec: str, cache: Path) -> Path:
    """The transformers folder for ``spec``, made under ``cache`` if need be; raises ModelUnavailable."""
    kind, _, name = spec.partition(":")
    if kind == "package" and name:
        return _prepared(spec, cache / f"{name}-{_package_version(name)}-f{FORMAT}")
    if kind == "tiny" and name:
        if not name.isdigit():
            raise ModelUnavailable(f"{spec!r}: a tiny model is tiny:SEED with a whole number, for example tiny:7")
        return _prepared(spec, cache / f"tiny-{name}-f{FORMAT}")
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelUnavailable(f"{folder}: no config.json; a base model is a transformers folder")
        return folder.resolve()
    return _from_hub(spec)


def _prepared(spec: str, folder: Path) -> Path:
    """``folder``, converted by a child process unless it is there already."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold(folder.with_name(f".{folder.name}.lock"), wait=True):
            if not folder.is_dir():
                _require_space(folder.parent, FREE_BYTES[spec.partition(":")[0]])
                _convert_in_child(spec, folder)
    except OSError as error:
        raise ModelUnavailable(f"{spec}: cannot write {folder.parent}: {error}") from error
    return folder


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelUnavailable(
            f"{folder}: {free / 1e6:.0f} MB free, the model needs {needed / 1e6:.0f} MB; free some or move the state"
        )


def _convert_in_child(spec: str, folder: Path) -> None:
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    command = [sys.executable, "-m", "deploy.models", spec, str(staging)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    root = str(Path(__file__).resolve().parent.parent)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ModelUnavailable(f"{spec}: the conversion failed:\n{done.stderr.strip()[-2000:]}")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelUnavailable(f"package {name} is not installed: run `make setup` or pip install {name}") from error


def _from_hub(name: str) -> Path:
    """A snapshot folder from the hub's cache, or from the hub itself where it can be reached."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f"{name!r} is neither a folder nor a model that the hub or its cache gives ({error}); use "
            "package:NAME, tiny:SEED, a transformers folder or a hub name"
        ) from error


def convert_package(name: str, folder: Path) -> None:
    """Write the one GGUF file inside the installed package ``name`` as bf16 safetensors into ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = importlib.util.find_spec(name.replace("-", "_"))
    roots = list(module.submodule_search_locations or ()) if module else []
    files = sorted(path for root in roots for path in Path(root).glob("*.gguf"))
    if len(files) != 1:
        raise ModelUnavailable(f"package {name}: expected one *.gguf inside, found {len(files)}")
    source, gguf = files[0].parent, files[0].name
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype="bfloat16")
    # a model that came from GGUF counts as quantised and refuses to be saved: its weights go into a fresh one
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    fresh = type(loaded)(loaded.config).to(loaded.dtype)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)


def make_tiny(seed: int, folder: Path) -> None:
    """Write a random fp32 Llama of 2 layers with a byte-level ChatML tokenizer into ``folder``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(symbol, special=True) for symbol in specials])
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token=specials[0], bos_token=specials[1], eos_token=specials[2],
        pad_token=specials[2], chat_template=CHATML, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(symbols), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def main(spec: str, folder: Path) -> None:
    """What the child process does: one conversion into ``folder``."""
    kind, _, name = spec.partition(":")
    if kind == "package":
        convert_package(name, folder)
    else:
        make_tiny(int(name), folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except ModelUnavailable as error:
        sys.exit(str(error))
