"""Where the text comes from: every corpus becomes token shards on disk, once, in `corpus/<name>/`.

- the texts of documents.py, in a vocabulary's tokens: `python` (the default), or the user's own;
- token shards that exist already: llm.c's and modded-nanogpt's .bin (magic 20240520), nanoGPT's
  headerless uint16 .bin;
- `fineweb`: the public GPT-2 shards of FineWeb, fetched over HTTPS.
"""

import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import Corpus, read_shard, shard_header
from documents import TEXT_HELD_OUT, documents_of, origin_of
from safety import BadInput
from vocabulary import PYTHON_1024, load_vocabulary

BUILT_IN = ("python", "fineweb")
CORPUS_FOLDER = Path("corpus")
SPLITS = {"train": "train_000.bin", "val": "val_000.bin"}
GPT2_TOKENS = 50257  # the last is <|endoftext|>


def open_corpus(data="python", vocabulary=None, n_tokens=0, root=CORPUS_FOLDER):
    """The corpus that `--data` names; its first use prepares it.

    vocabulary: None (what the corpus comes with: the small one for `python`, else GPT-2's), "gpt2"
    or a .tiktoken file. n_tokens: how many will be trained on, which decides how many shards of
    FineWeb are fetched. Raises BadInput for what is missing, empty, not text, or of no known
    format.
    """
    path = Path(data)
    if data == "fineweb":
        files = fetch_fineweb(Path(root) / "fineweb", n_tokens)
        # one corpus, however much of it is fetched
        return _open_shards(data, files, vocabulary or "gpt2", n_hashed=1)
    if data != "python" and not path.exists():
        raise BadInput(
            f"--data {data}: no such file or folder (python and fineweb are the built-in corpora)"
        )
    shards = [path] if path.suffix == ".bin" and path.is_file() else sorted(path.glob("*.bin"))
    if shards and data != "python":
        return _open_shards(path.stem, shards, vocabulary or "gpt2")
    vocabulary = vocabulary or (PYTHON_1024 if data == "python" else "gpt2")
    # "." has a name, too
    folder = Path(root) / f"{Path(os.path.abspath(data)).stem}-{Path(vocabulary).stem}"
    fingerprint = _fingerprint(data, vocabulary)
    if not (folder / "meta.json").exists() or _read_meta(folder)["fingerprint"] != fingerprint:
        _prepare(folder, data, vocabulary, fingerprint)
    meta = _read_meta(folder)
    if meta["vocabulary"] != "gpt2":
        vocabulary = str(folder / meta["vocabulary"])
    train, val = ([read_shard(folder / name)] for name in SPLITS.values())
    return Corpus(
        folder.name, vocabulary, meta["d_vocab"], meta["start_token"], meta["sha256"], train, val
    )


# --- text to shards


def _prepare(folder, data, vocabulary, fingerprint):
    """Encodes every document and writes the shards with their meta.json; the folder appears when it
    is complete.
    """
    started = time.time()
    print(f"preparing the corpus {data} in the vocabulary {Path(vocabulary).stem} ...", flush=True)
    encoding = load_vocabulary(vocabulary)
    documents, shards = _encode(documents_of(data), encoding)
    if not any(documents.values()):
        raise BadInput(f"--data {data}: no text in it")
    meta = {
        "source": data,
        "fingerprint": fingerprint,
        "sha256": _sha256(shards.values()),
        "vocabulary": "gpt2" if vocabulary == "gpt2" else "vocabulary.tiktoken",
        "d_vocab": encoding.n_vocab,
        "start_token": encoding.eot_token,
        "documents": documents,
        "tokens": {split: len(shard) for split, shard in shards.items()},
    }
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for split, name in SPLITS.items():
            (partial / name).write_bytes(shard_header(len(shards[split])) + shards[split].tobytes())
        if vocabulary != "gpt2":  # the vocabulary travels with the corpus
            shutil.copyfile(vocabulary, partial / "vocabulary.tiktoken")
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"prepared in {time.time() - started:.0f} s:"
        f" {len(shards['train']):,} tokens of {documents['train']:,} documents to train on,"
        f" {len(shards['val']):,} of {documents['val']:,} held out",
        flush=True,
    )


def _encode(documents, encoding):
    """How many documents each split has, and its tokens; <|endoftext|> opens every document."""
    parts, opening = {split: [] for split in SPLITS}, [encoding.eot_token]
    # arrays from the start: as Python's numbers tokens would take a dozen times the text's size
    encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(documents, 512)):
            encoded = pool.map(encode, [text for _, text in batch])
            for (held_out, _), tokens in zip(batch, encoded, strict=True):
                tokens = np.concatenate([opening, tokens], dtype=np.uint16, casting="unsafe")
                parts["val" if held_out else "train"].append(tokens)
    documents = {split: len(part) for split, part in parts.items()}
    empty = [np.zeros(0, dtype=np.uint16)]
    shards = {split: np.concatenate(part or empty) for split, part in parts.items()}
    if documents["val"] * 2 * TEXT_HELD_OUT < documents["train"] or documents["train"] == 0:
        # too few documents to hold some out: the last tenth of the text has to do
        stream = np.concatenate([shards["train"], shards["val"]])
        cut = len(stream) - len(stream) // 10
        shards = {"train": stream[:cut], "val": stream[cut:]}
    return documents, shards


def _fingerprint(data, vocabulary):
    """Changes when the corpus has to be prepared again: another vocabulary, other files, other
    versions of the packages.
    """
    parts = origin_of(data)
    if vocabulary != "gpt2":
        parts.append(hashlib.sha256(Path(vocabulary).read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read_meta(folder):
    return json.loads((folder / "meta.json").read_text())


def _sha256(shards):
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(shard)
    return digest.hexdigest()


# --- shards that exist already


def _open_shards(name, files, vocabulary, n_hashed=None):
    """Those with "val" in their names are held out; if there are none, or only such, the last
    file's last tenth is. n_hashed: of how many training shards the hash tells (None: all).
    """
    held_out = [file for file in files if re.search(r"(^|[_-])val", file.name)]
    train = [read_shard(file) for file in files if file not in held_out]
    val = [read_shard(file) for file in held_out]
    if not train or not val:
        *train, last = train + val
        cut = len(last) - len(last) // 10
        train, val = [*train, last[:cut]], [last[cut:]]
    d_vocab, start = GPT2_TOKENS, GPT2_TOKENS - 1
    if vocabulary != "gpt2":  # which tiktoken would download
        encoding = load_vocabulary(vocabulary)
        d_vocab, start = encoding.n_vocab, encoding.eot_token
    sha256 = _sha256([*train[:n_hashed], *val])
    return Corpus(name, vocabulary, d_vocab, start, sha256, train, val)


FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
FINEWEB_SHARDS = 103
FINEWEB_SHARD_TOKENS = 100_000_000


def fetch_fineweb(folder, n_tokens, url=FINEWEB_URL):
    """Fetches the held-out shard and as many training shards as n_tokens need; what is already
    there is kept. -> their paths, the held-out one first.
    """
    needed = max(1, -(-n_tokens // FINEWEB_SHARD_TOKENS))
    if needed > FINEWEB_SHARDS:
        print(f"FineWeb's public sample has {FINEWEB_SHARDS} shards: some tokens will come twice")
    names = ["val_000000", *(f"train_{n:06d}" for n in range(1, min(needed, FINEWEB_SHARDS) + 1))]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"fineweb_{name}.bin" for name in names]
    for path in paths:
        download_shard(f"{url}{path.name}", path)
    return paths


def download_shard(url, path, attempts=5, wait=2.0):
    """Fetches one shard to `path`. A broken connection is taken up where it broke, now or at the
    next call; the file gets its name only when its size and header are right. Gives up with
    BadInput after `attempts` tries in a row that brought nothing.
    """
    if path.exists():
        read_shard(path)
        return
    partial = path.with_name(path.name + ".partial")
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _download_rest(url, partial)
            break
        except urllib.error.HTTPError as error:
            # all of it is here: an earlier call was stopped before it could rename the file
            if error.code == 416:
                break
            raise BadInput(f"could not fetch {url} ({error})") from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            got = partial.stat().st_size if partial.exists() else 0
            failures = 1 if got > before else failures + 1
            if failures >= attempts:
                raise BadInput(
                    f"could not fetch {url} ({error}); the same command goes on from {got:,} bytes"
                ) from None
            time.sleep(wait)
    try:
        read_shard(partial)
    except BadInput as error:
        partial.unlink()
        raise BadInput(f"{url} is no token shard: {error}") from None
    partial.rename(path)


def _download_rest(url, partial):
    """Appends to `partial` what it lacks. Raises if the server, or the connection, ends before the
    size it announced.
    """
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=30) as response:
        if response.status != 206:  # the server sends everything from the start
            have = 0
        total = have + int(response.headers["Content-Length"])
        with open(partial, "ab" if have else "wb") as file:
            shown = time.time()
            while block := response.read(2**20):
                file.write(block)
                have += len(block)
                if time.time() - shown > 5 or have == total:
                    print(f"{partial.stem}: {have / 1e6:,.0f} of {total / 1e6:,.0f} MB", flush=True)
                    shown = time.time()
    if have != total:
        raise http.client.HTTPException(f"connection closed after {have:,} of {total:,} bytes")
