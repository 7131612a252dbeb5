"""A snapshot comes back as it was; what is not whole, or not weights alone, is refused."""

import dataclasses
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from safety import BadInput
from snapshots import load_snapshot, save_snapshot
from tests.test_model import SMALL, each_variant, make, tokens

ROOT = Path(__file__).parent.parent
CORPUS = {"data": "python", "name": "python-1024", "sha256": "0"}


@each_variant
def test_a_snapshot_comes_back_as_it_was_saved(config, tmp_path):
    model = make(config)
    save_snapshot(tmp_path / "a.pt", model, 7, 70, CORPUS)
    loaded, about = load_snapshot(tmp_path / "a.pt")
    assert about == {"step": 7, "tokens": 70, "corpus": CORPUS}
    assert loaded.config == config
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_opening_a_snapshot_does_not_import_the_compiler(tmp_path):
    """Which takes as long as importing the rest of PyTorch."""
    save_snapshot(tmp_path / "a.pt", make(SMALL), 0, 0, CORPUS)
    program = "import sys; from snapshots import load_snapshot; load_snapshot(sys.argv[1])"
    program += "; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, tmp_path / "a.pt"], cwd=ROOT, check=True)


class Bomb:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def snapshot_content():
    model = make(SMALL)
    return {
        "config": dataclasses.asdict(SMALL),
        "weights": dict(model.state_dict()),
        "about": {"step": 0, "tokens": 0, "corpus": CORPUS},
    }


def refuses(path, match):
    with pytest.raises(BadInput, match=match) as error:
        load_snapshot(path)
    assert "\n" not in str(error.value)


def test_a_snapshot_that_would_run_code_is_not_opened(tmp_path):
    evil, sign = tmp_path / "evil.pt", tmp_path / "it_ran"
    torch.save({"config": Bomb(f"touch {sign}"), "weights": {}, "about": {}}, evil)
    refuses(evil, "not tensors alone")
    evil.write_bytes(pickle.dumps(Bomb(f"touch {sign}")))
    refuses(evil, "damaged")
    assert not sign.exists()


@pytest.mark.parametrize("size", [0, 10, 1000, -1000, -1])
def test_a_snapshot_cut_short_is_not_opened(tmp_path, size):
    save_snapshot(tmp_path / "a.pt", make(SMALL), 0, 0, CORPUS)
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:size])
    refuses(tmp_path / "a.pt", "damaged")


def test_a_snapshot_with_one_wrong_bit_in_its_weights_is_not_opened(tmp_path):
    path, model = tmp_path / "a.pt", make(SMALL)
    save_snapshot(path, model, 0, 0, CORPUS)
    content, weights = bytearray(path.read_bytes()), model.embed["W_E"].detach().numpy().tobytes()
    content[content.index(weights) + 5] ^= 1
    path.write_bytes(content)
    refuses(path, "damaged")


def test_foreign_files_are_not_opened(tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("hello")
    refuses(path, "damaged")
    torch.save({"model": {}, "optimizer": {}}, path)  # nanoGPT's
    refuses(path, "not a snapshot")
    torch.save([1, 2], path)
    refuses(path, "holds a list")


def change_config(**change):
    def spoil(content):
        content["config"] |= change

    return spoil


def change_about(**change):
    def spoil(content):
        content["about"] |= change

    return spoil


def drop_a_weight(content):
    del content["weights"]["blocks.1.attn.W_Q"]


def reshape_a_weight(content):
    content["weights"]["blocks.1.attn.W_Q"] = torch.zeros(2, 32, 9)


def retype_a_weight(content):
    content["weights"]["ln_final.w"] = torch.zeros(32, dtype=torch.int64)


def hide_its_origin(content):
    del content["about"]["corpus"]


def claim_a_huge_weight(content):
    content["config"] |= {"d_vocab": 10**10}
    content["weights"]["embed.W_E"] = torch.zeros(1).expand(10**10, 32)
    content["weights"]["unembed.W_U"] = torch.zeros(1).expand(32, 10**10)


@pytest.mark.parametrize(
    "spoil",
    [
        change_config(n_layers=10**9), change_config(n_ctx=10**12), change_config(d_model=64),
        change_config(n_layers="3"), change_config(colour="red"), change_config(d_mlp=0),
        change_config(windows=7), change_config(position_base="x"), change_config(n_heads=10**9),
        change_config(n_heads=2**31 - 1, d_head=2**31 - 1, d_model=2**15, n_ctx=1),
        change_config(windows=torch.ones(1).expand(10**10)), change_config(smear=torch.ones(2)),
        change_config(d_mlp=10**5000), change_config(position_scale=float("inf")),
        change_config(init_value=torch.ones(3, 3)), change_config(colour={"a": "\n" * 1000}),
        change_about(step=float("inf")), change_about(step=torch.ones(2)), change_about(step=-1),
        change_about(tokens=10**5000), change_about(corpus=torch.ones(2)),
        drop_a_weight, reshape_a_weight, retype_a_weight, claim_a_huge_weight, hide_its_origin,
    ],
)  # fmt: skip
def test_a_snapshot_whose_parts_disagree_is_not_opened(tmp_path, spoil):
    content = snapshot_content()
    spoil(content)
    torch.save(content, tmp_path / "a.pt")
    refuses(tmp_path / "a.pt", "snapshot")


def test_a_snapshot_with_compressed_entries_is_not_opened(tmp_path):
    save_snapshot(tmp_path / "a.pt", make(SMALL), 0, 0, CORPUS)
    with zipfile.ZipFile(tmp_path / "a.pt") as stored:
        with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as deflated:
            for entry in stored.infolist():
                deflated.writestr(entry.filename, stored.read(entry))
    refuses(tmp_path / "b.pt", "compressed|holds a NoneType|damaged")


def test_a_missing_snapshot_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_snapshot(tmp_path / "none.pt")
