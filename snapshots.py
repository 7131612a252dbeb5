"""Weights on disk: a snapshot describes itself, and a stranger's file can at worst be refused.

A snapshot is one file with the model's sizes, its weights under TransformerLens' names, how far it
was trained and on which corpus.
"""

import dataclasses
import io
import zipfile
from pathlib import Path

import torch

from model import ModelConfig, Transformer
from safety import BadInput, brief, write_whole


def save_snapshot(path, model, step, tokens, corpus):
    """The weights after that many steps and tokens, with all that is needed to use them.

    corpus: {"data": what --data said, "name", "sha256"} of the text that they were trained on.
    """
    content = {
        "config": dataclasses.asdict(model.config),
        "weights": {name: weight.detach().cpu() for name, weight in model.state_dict().items()},
        "about": {"step": step, "tokens": tokens, "corpus": corpus},
    }
    write_whole(path, lambda temporary: save_tensors(content, temporary))


def load_snapshot(path, **options):
    """-> (model, about): what `save_snapshot` wrote; about is {"step", "tokens", "corpus"}.

    The file may come from a stranger: it can run no code, and no memory is taken that it does not
    back. options: kernels and dtype, as for Transformer. Raises BadInput if the file is not a whole
    snapshot.
    """
    content = load_tensors(path)
    try:
        weights, config, about = (
            dict(of_kind(dict, content[name])) for name in ("weights", "config", "about")
        )
        corpus = of_kind(dict, about["corpus"])
        about = {
            "step": of_kind(int, about["step"]),
            "tokens": of_kind(int, about["tokens"]),
            "corpus": {name: of_kind(str, corpus[name]) for name in ("data", "name", "sha256")},
        }
        if config["windows"] is not None:
            config["windows"] = tuple(of_kind((tuple, list), config["windows"]))
        config = ModelConfig(**config)
        if not all(0 <= about[name] < 2**63 for name in ("step", "tokens")):
            raise BadInput("steps and tokens that no training comes to")
    except (KeyError, TypeError, ValueError, BadInput) as error:
        raise BadInput(f"{path}: not a snapshot written by train.py ({brief(error)})") from None
    # so far the sizes are only the file's word: nothing larger than the file is built from them
    n_bytes = Path(path).stat().st_size
    if config.n_layers > len(weights) or 4 * config.n_ctx * config.d_model > max(n_bytes, 2**26):
        raise BadInput(f"{path}: a damaged snapshot: it is too small for the sizes that it tells")
    try:
        with torch.device("meta"):
            expected = Transformer(config).state_dict()
    except RuntimeError as error:  # more numbers than can be counted
        raise BadInput(f"{path}: a damaged snapshot ({brief(error)})") from None
    expected = {name: (w.shape, w.dtype, torch.strided, "cpu") for name, w in expected.items()}
    found = {
        name: (w.shape, w.dtype, w.layout, w.device.type) if torch.is_tensor(w) else None
        for name, w in weights.items()
    }
    if found != expected:
        odd, *_ = (brief(name) for name, _ in found.items() ^ expected.items())
        raise BadInput(f"{path}: a damaged snapshot: {odd} does not fit the sizes that it tells")
    if 4 * sum(shape.numel() for shape, *_ in expected.values()) > n_bytes:
        raise BadInput(f"{path}: a damaged snapshot: its weights are larger than the file")
    model = Transformer(config, **options)
    model.load_state_dict(weights)
    return model, about


def of_kind(kind, value):
    """value, if it is of that type: a file can hold a tensor, or any other, in its place."""
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where none belongs")
    return value


def save_tensors(content, path):
    """Tensors and plain values to a file, through memory: torch.save would hide a full disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def load_tensors(path):
    """What `save_tensors` wrote; anything but tensors and plain values, like code, is BadInput."""
    with open(path, "rb") as file:  # a file that is not there says so itself
        if not zipfile.is_zipfile(file):
            raise BadInput(f"{path}: damaged, cut short, or not written by train.py")
    try:
        with zipfile.ZipFile(path) as file:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())
            spoilt = stored and file.testzip()  # PyTorch reads past wrong checksums
        if spoilt:
            raise BadInput(f"{spoilt} is not what was written")
        # torch.save compresses nothing, and a compressed entry could unpack to any size
        content = torch.load(path, map_location="cpu", weights_only=True) if stored else None
    except Exception as error:  # a stranger's file can fail in any way
        raise BadInput(
            f"{path}: not opened: damaged, or not tensors alone ({brief(error)})"
        ) from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, not what train.py writes")
    return content
