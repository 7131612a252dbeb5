"""The page holds claims, figures and data, asks the network for nothing, and works in a browser."""

import base64
import io
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from plots import report
from plots.runs import head_on_passage, load_run
from tests import chromium
from tests.records_by_hand import make_world
from tests.test_token_figures import RIGHT, TEXT, make_passages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records made by hand; 2L and 1L have passages."""
    folder = make_world(tmp_path_factory.mktemp("results") / "mini")
    # in steps of 0.2M tokens: the phase change of these records is from 3.4M to 4.6M
    make_passages(folder / "2L", window=(17, 23), tokens=200_000)
    make_passages(folder / "1L", seed=1)
    (folder / "figures").mkdir()
    noise = np.random.default_rng(0).integers(255, size=(400, 2000, 3), dtype=np.uint8)
    for name in ("passage", "ablations"):
        Image.fromarray(noise).save(folder / "figures" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def path(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([str(folder), "--out", str(path)]) == 0
    return path


def data_of(path):
    (content,) = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL
    )
    return json.loads(content)


# what is on the page


def test_the_page_is_small_and_asks_for_nothing(path):
    content = path.read_text()
    assert path.stat().st_size < 5_000_000
    assert "default-src 'none'" in content
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:)?//", content)
    links = re.findall(r"(?:src|href)=\"(.*?)\"", content)
    assert links and all(link.startswith(("#", "data:image/webp;base64,")) for link in links)
    assert "{{" not in content


def test_every_claim_and_every_figure_is_there(path, folder):
    content = path.read_text()
    for row in report.claims_table(folder):
        assert f">{row['']}</td>" in content
        assert f'class="{row["verdict"].strip("*").replace(" ", "-")}"' in content
    pictures = re.findall(r'<figure id="(.*?)">.*?base64,(.*?)">', content)
    assert [name for name, _ in pictures] == ["ablations", "passage"]
    for _, picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (1600, 320)
    assert 'href="#ablations"' in content


def test_the_viewer_has_the_records(path, folder):
    two, one = data_of(path)
    assert (two["name"], one["name"]) == ("2L", "1L")
    assert two["snapshots"] == [
        "0.00M tokens: before the phase change",
        "3.40M tokens: start of the phase change",
        "4.00M tokens: in the phase change",
        "4.60M tokens: end of the phase change",
        "7.80M tokens: after the phase change",
    ]
    assert one["snapshots"][-1] == "3.90M tokens: no phase change"
    assert [head["name"] for head in two["heads"]] == ["0:0", "0:1", "1:0", "1:1"]
    assert two["heads"][two["first"]] == {"name": "1:0", "kind": "induction"}
    passage = load_run(folder / "2L").passage
    text = two["texts"]["prose"]
    assert "".join(text["tokens"]) == b"".join(TEXT).decode()
    assert np.allclose(text["loss"][3][1:], passage["prose_loss"][23][1:], atol=0.01)
    packed = zlib.decompress(base64.b64decode(text["pattern"]))
    pattern = np.frombuffer(packed, np.uint8).reshape(5, 4, -1)
    seen, _ = head_on_passage(passage, "prose", 4, 1, 1)
    assert np.array_equal(pattern[4, 3] / 255, seen[np.tril_indices(len(TEXT))])


def test_of_many_heads_the_best_of_each_layer_are_viewed(folder):
    run = load_run(folder / "2L")
    rows = [
        {
            "head": f"{layer}:{head}",
            "prefix_matching": head / 10,
            "previous_token": 0.35 - head / 10,
        }
        for layer in range(2)
        for head in range(6)
    ]
    run.summary["heads"] = rows
    assert report.heads_of(run) == [(n, head) for n in range(2) for head in (0, 3, 4, 5)]


# safety


def test_markdown_and_nothing_else():
    shown = report.inline("**a** *b* `*c* <d>` [fig](x/fig.png)<br><script>alert(1)</script> & '\"")
    assert shown == (
        "<strong>a</strong> <em>b</em> <code>*c* &lt;d&gt;</code>"
        ' <a href="#fig">fig</a><br>&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#x27;&quot;'
    )


def test_no_token_can_end_the_script():
    nasty = [{"tokens": ["</script><script>alert(1)//", "<!--", "\u2028"]}]
    written = report.in_script(nasty)
    assert "<" not in written and json.loads(written) == nasty


def test_pictures_shrink_until_the_page_fits(folder, monkeypatch, capsys):
    whole = len(report.page(folder))
    monkeypatch.setattr(report, "LIMIT", whole - 1)
    assert len(report.page(folder)) < whole
    monkeypatch.setattr(report, "LIMIT", 1000)
    assert report.main([str(folder)]) == 2
    assert "larger than" in capsys.readouterr().err


def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys):
    assert report.main([str(tmp_path)]) == 2
    world = make_world(tmp_path / "mini")
    assert report.main([str(world)]) == 2
    make_passages(world / "2L")
    (world / "figures").mkdir()
    (world / "figures" / "broken.png").write_bytes(b"\x89PNG")
    assert report.main([str(world)]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "no runs" in first and "passage.npz" in second and "broken.png" in third
    monkeypatch.setattr(report.Image, "MAX_IMAGE_PIXELS", 1)
    assert report.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "too large" in error


# in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if chromium.PROGRAM is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    page = chromium.Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def viewer(page, path):
    """The viewer at head 1:1 in the last snapshot of 2L, on its Python text."""
    page.load(path)
    page.wait_for("document.querySelectorAll('#tokens span').length > 0")
    choose(page, "run", "2L: 2 layers, attention-only, seed 0")
    page.wait_for("document.querySelectorAll('#heads input').length === 4")
    page.mouse("#heads label:nth-of-type(4) input", click=True)
    return page


def choose(page, menu, value):
    page.evaluate(
        f"(menu => {{menu.value = {json.dumps(value)};"
        f" menu.dispatchEvent(new Event('change'))}})({menu}Menu)"
    )


def coloured(page):
    """Tokens with their share of the head's attention, and those to whose colour blue is added."""
    red, blue = page.evaluate(
        "['backgroundColor', 'boxShadow'].map(what => [...tokens.children].map(span =>"
        " Number(span.style[what].match(/\\/ ([\\d.]+)/)[1])))"
    )
    return (
        {n: share for n, share in enumerate(red) if share},
        {n: share for n, share in enumerate(blue) if share},
    )


def test_it_loads_without_an_error_or_a_request(viewer):
    assert viewer.errors() == []
    assert {address.split(":")[0] for address in viewer.requested()} <= {"file", "data"}
    assert viewer.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


def test_hovering_changes_what_is_coloured(viewer):
    for query, key in RIGHT:
        viewer.mouse(f"#tokens span:nth-child({query + 1})")
        # 204 steps of 255; 100 steps of 0.02 nats where 3 are full
        red, blue = coloured(viewer)
        assert red == {key: pytest.approx(0.8)} and blue == {key: pytest.approx(0.667)}
        told = viewer.evaluate("told.textContent")
        assert "1:1 attends to" in told and "0.80" in told and "adds 2.00 nats" in told
    viewer.mouse("#tokens span:nth-child(2)")
    assert coloured(viewer) == ({}, {})


def test_a_click_keeps_a_token_and_arrows_walk(viewer):
    (query, key), (_, next_key) = RIGHT[:2]
    viewer.mouse(f"#tokens span:nth-child({query + 1})", click=True)
    viewer.mouse("#viewer h2")
    assert list(coloured(viewer)[0]) == [key]
    viewer.evaluate("tokens.focus()")
    viewer.key("ArrowRight")
    assert list(coloured(viewer)[0]) == [next_key]
    viewer.key("Home")
    assert "start token" in viewer.evaluate("told.textContent")
    viewer.key("ArrowLeft")
    viewer.key("End")
    assert viewer.evaluate("document.querySelector('.query').dataset.n") == str(len(TEXT) - 1)


def test_sliding_changes_the_snapshot(viewer):
    query, key = RIGHT[0]
    viewer.mouse(f"#tokens span:nth-child({query + 1})", click=True)
    viewer.mouse("#viewer h2")
    after = viewer.evaluate("told.textContent")
    assert viewer.evaluate("when.textContent") == "7.80M tokens: after the phase change"
    viewer.evaluate("slider.focus()")
    viewer.key("ArrowLeft")
    assert viewer.evaluate("when.textContent") == "4.60M tokens: end of the phase change"
    # these records have a pattern at the last snapshot alone
    assert coloured(viewer) == ({}, {})
    assert viewer.evaluate("told.textContent") != after
    viewer.key("ArrowRight")
    assert list(coloured(viewer)[0]) == [key]


def test_picking_a_head_a_text_and_a_run_changes_it(viewer):
    viewer.mouse(f"#tokens span:nth-child({RIGHT[0][0] + 1})", click=True)
    viewer.mouse("#viewer h2")
    assert coloured(viewer)[0]
    viewer.mouse("#heads label:nth-of-type(3) input", click=True)
    assert coloured(viewer) == ({}, {})
    assert "1:0 attends to" in viewer.evaluate("told.textContent")
    loss = viewer.evaluate("text.loss[4][1]")
    choose(viewer, "text", "prose")
    viewer.wait_for(f"text.loss[4][1] !== {loss}")
    choose(viewer, "run", "1L: 1 layer, attention-only, seed 0")
    viewer.wait_for("document.querySelectorAll('#heads input').length === 2")
    viewer.wait_for("when.textContent.includes('no phase change')")
    assert viewer.errors() == []
