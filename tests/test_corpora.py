"""From text and shards to a corpus; a download that breaks off; and everything that is no text."""

import gzip
import http.server
import lzma
import threading

import numpy as np
import pytest
import torch

from corpora import download_shard, fetch_fineweb, open_corpus
from data import random_sequences, shard_header
from documents import END_OF_TEXT, text_documents
from safety import BadInput
from tests.test_documents import THREE
from vocabulary import PYTHON_1024, load_vocabulary

# text


def test_a_text_corpus_decodes_to_its_documents(text_file, corpus):
    encoding = load_vocabulary(corpus.vocabulary)
    stream = encoding.decode(corpus.train[0].tolist()) + encoding.decode(corpus.val[0].tolist())
    documents = {part for part in stream.split(END_OF_TEXT) if part}
    assert documents == {text for _, text in text_documents(text_file)}
    assert corpus.train[0][0] == corpus.start_token == encoding.eot_token
    assert corpus.d_vocab == 1024


def test_a_separator_within_a_line_is_text_like_any_other(tmp_path):
    text = f"the token {END_OF_TEXT} of a page on vocabularies\n" * 100
    (tmp_path / "one.txt").write_text(text)
    corpus = open_corpus(str(tmp_path / "one.txt"), PYTHON_1024, root=tmp_path)
    encoding = load_vocabulary(corpus.vocabulary)
    stream = np.concatenate([corpus.train[0], corpus.val[0]])
    assert (stream == encoding.eot_token).nonzero()[0].tolist() == [0]
    assert encoding.decode(stream[1:].tolist()) == text


def test_one_document_in_twenty_is_held_out_whole(text_file, corpus):
    held_out = [text for out, text in text_documents(text_file) if out]
    encoding = load_vocabulary(corpus.vocabulary)
    assert encoding.decode(corpus.val[0].tolist()).split(END_OF_TEXT)[1:] == held_out
    assert 5 <= len(held_out) <= 30  # of 300


def test_a_single_document_gives_its_last_tenth(tmp_path):
    (tmp_path / "one.txt").write_text("a b c d e f g h\n" * 500)
    corpus = open_corpus(str(tmp_path / "one.txt"), PYTHON_1024, root=tmp_path)
    n_train, n_val = len(corpus.train[0]), len(corpus.val[0])
    assert n_val == (n_train + n_val) // 10


def test_a_corpus_is_prepared_once_and_again_when_the_text_changes(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text(THREE * 50)
    first = open_corpus(str(path), PYTHON_1024, root=tmp_path / "c")
    assert "preparing" in capsys.readouterr().out
    again = open_corpus(str(path), PYTHON_1024, root=tmp_path / "c")
    assert capsys.readouterr().out == ""
    assert first.sha256 == again.sha256
    path.write_text(THREE * 51)
    changed = open_corpus(str(path), PYTHON_1024, root=tmp_path / "c")
    assert changed.sha256 != first.sha256
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["a-python-1024"]


def test_a_corpus_of_the_folder_one_stands_in_is_prepared_once(tmp_path, monkeypatch, capsys):
    """Though its shards, and the runs, then lie among the texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(THREE * 50)
    monkeypatch.chdir(texts)
    assert open_corpus(".", PYTHON_1024).name == "texts-python-1024"
    capsys.readouterr()
    (texts / "README.md").write_text("no text of the corpus")
    open_corpus(".", PYTHON_1024)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"\n \n", "no text"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0", "not UTF-8"),
        ("a.txt", b"text\0with zeros", "binary"),
        ("a.txt.gz", b"not gzip at all", "damaged"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-20], "damaged"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-20], "damaged"),
        ("a.txt.xz", b"not xz at all", "damaged"),
    ],
)
def test_what_is_no_text_is_refused_and_leaves_nothing(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=fault):
        open_corpus(str(path), PYTHON_1024, root=tmp_path / "c")
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_missing_and_empty_places_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        open_corpus(str(tmp_path / "nowhere"), root=tmp_path / "c")
    with pytest.raises(BadInput, match="no .txt"):
        open_corpus(str(tmp_path), PYTHON_1024, root=tmp_path / "c")


# shards


def write_shard(path, tokens, header=True):
    tokens = np.asarray(tokens, dtype=np.uint16)
    path.write_bytes((shard_header(len(tokens)) if header else b"") + tokens.tobytes())


@pytest.mark.parametrize("header", [True, False], ids=["llm.c", "nanoGPT"])
def test_a_folder_of_shards_is_a_corpus(tmp_path, header):
    write_shard(tmp_path / "x_train_000001.bin", range(100), header)
    write_shard(tmp_path / "x_train_000002.bin", range(100, 150), header)
    write_shard(tmp_path / "x_val_000000.bin", range(200, 230), header)
    corpus = open_corpus(str(tmp_path))
    assert [len(shard) for shard in corpus.train] == [100, 50]
    assert corpus.val[0].tolist() == list(range(200, 230))
    assert (corpus.d_vocab, corpus.start_token) == (50257, 50256)


def test_the_last_tenth_of_a_lone_shard_is_held_out(tmp_path):
    write_shard(tmp_path / "tokens.bin", range(100))
    corpus = open_corpus(str(tmp_path / "tokens.bin"), PYTHON_1024)
    assert corpus.train[0].tolist() == list(range(90))
    assert corpus.val[0].tolist() == list(range(90, 100))
    assert corpus.d_vocab == 1024


def test_the_hash_is_of_the_tokens(tmp_path):
    for name, tokens in (("a", [1, 2, 3] * 10), ("b", [1, 2, 3] * 10), ("c", [1, 2, 4] * 10)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "train.bin", tokens)
        write_shard(tmp_path / name / "val.bin", tokens)
    a, b, c = (open_corpus(str(tmp_path / name)).sha256 for name in "abc")
    assert a == b != c


# FineWeb, from a server on this machine


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; drops the connection half way the first `drops` times; may know no ranges."""

    files, drops, knows_ranges, requests = {}, 0, True, []

    def do_GET(self):
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_error(404)
            return
        first = 0
        if self.knows_ranges and "Range" in self.headers:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        type(self).requests.append(first)
        if first and first >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        rest = content[first:]
        if len(type(self).requests) <= self.drops:
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    tokens = np.random.default_rng(0).integers(50257, size=300_000).astype(np.uint16)
    shard = shard_header(len(tokens)) + tokens.tobytes()

    class Fresh(Server):
        files = {
            f"fineweb_{name}.bin": shard for name in ("val_000000", "train_000001", "train_000002")
        }
        requests = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        Fresh.url = f"http://127.0.0.1:{httpd.server_port}/"
        Fresh.shard = shard
        yield Fresh
        httpd.shutdown()
        thread.join()


def test_fineweb_is_fetched_as_far_as_needed_and_once(server, tmp_path):
    fetch_fineweb(tmp_path / "f", 150_000_000, server.url)
    names = sorted(path.name for path in (tmp_path / "f").iterdir())
    assert names == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
        "fineweb_val_000000.bin",
    ]
    assert all((tmp_path / "f" / name).read_bytes() == server.shard for name in names)
    fetch_fineweb(tmp_path / "f", 150_000_000, server.url)
    assert len(server.requests) == 3
    corpus = open_corpus(str(tmp_path / "f"))
    assert len(corpus.train) == 2 and len(corpus.val) == 1


def test_fineweb_is_one_corpus_however_much_of_it_is_asked_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr("data.COUNTED_TOKENS", 300_000)
    *_, last = fetch_fineweb(tmp_path / "fineweb", 150_000_000, server.url)
    last.write_bytes(shard_header(200_000) + np.arange(400_000, dtype=np.uint16)[::2].tobytes())
    whole, part = (open_corpus("fineweb", None, n, tmp_path) for n in (150_000_000, 0))
    assert [len(corpus.train) for corpus in (whole, part)] == [2, 1]
    assert (whole.name, whole.sha256) == (part.name, part.sha256)
    assert torch.equal(random_sequences(whole), random_sequences(part))


def test_a_dropped_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.drops = 2
    download_shard(server.url + "fineweb_val_000000.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == server.shard
    half = len(server.shard) // 2
    assert server.requests == [0, half, half + (len(server.shard) - half) // 2]
    assert not (tmp_path / "a.bin.partial").exists()


def test_an_interrupted_download_goes_on_at_the_next_call(server, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(server.shard[:1000])
    download_shard(server.url + "fineweb_val_000000.bin", tmp_path / "a.bin", wait=0)
    assert server.requests == [1000]
    assert (tmp_path / "a.bin").read_bytes() == server.shard


def test_a_download_that_was_complete_but_not_renamed_is_used(server, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(server.shard)
    download_shard(server.url + "fineweb_val_000000.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == server.shard


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.knows_ranges = False
    (tmp_path / "a.bin.partial").write_bytes(b"something else")
    download_shard(server.url + "fineweb_val_000000.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == server.shard


def test_a_connection_that_never_brings_anything_is_given_up(tmp_path):
    with pytest.raises(BadInput, match="the same command goes on"):
        download_shard("http://127.0.0.1:9/none.bin", tmp_path / "a.bin", attempts=2, wait=0)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_not_asked_for_twice(server, tmp_path):
    with pytest.raises(BadInput, match="404"):
        download_shard(server.url + "nothing.bin", tmp_path / "a.bin", wait=0)
    assert not list(tmp_path.iterdir())


def test_a_page_in_place_of_a_shard_is_thrown_away(server, tmp_path):
    server.files["odd.bin"] = shard_header(5) + bytes(8)
    with pytest.raises(BadInput, match="no token shard"):
        download_shard(server.url + "odd.bin", tmp_path / "a.bin", wait=0)
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_on_disk_is_noticed(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(server.shard[:-2])
    with pytest.raises(BadInput, match="cut short"):
        download_shard(server.url + "fineweb_val_000000.bin", tmp_path / "a.bin", wait=0)
