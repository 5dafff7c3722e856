"""The page of `fastrank compare` in headless Chromium: `make test-browser`."""

import chromium
import pytest
from fabricated_runs import fabricate

from fastrank.federated.compare import make_comparison

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    with chromium.Chromium(program, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of a page with eight configurations and all four plots."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs")
    for i, method in enumerate(("fedit", "fedavg", "head-only", "bitfit")):
        for alpha in (0.1, 1):
            for seed in (0, 1):
                ranks = [{"a.q": 4, "a.v": 3}, {"a.q": 1}] if method == "fedit" else None
                fabricate(
                    folder / f"{method}-{alpha}-{seed}", [0.1, 0.9 - i / 10 + seed / 100],
                    method=method, alpha=alpha, seed=seed, ranks=ranks,
                )  # fmt: skip
    make_comparison([folder], out=folder / "out")
    return (folder / "out" / "compare.html").as_uri()


def requests(tab):
    return [
        event["params"]["request"]["url"]
        for event in tab.events
        if event.get("method") == "Network.requestWillBeSent"
    ]


def complaints(tab):
    names = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [event["params"] for event in tab.events if event.get("method") in names]


def column(tab, number):
    """Texts of one column of the results, top to bottom."""
    return tab.evaluate(
        f"[...document.querySelectorAll('#results tbody tr')].map(r => r.cells[{number}].innerText)"
    )


def test_the_page_loads_whole_and_asks_for_nothing(tab, page):
    tab.open(page)
    sizes = tab.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert len(sizes) == 4
    assert min(sizes) > 100
    assert complaints(tab) == []
    asked = requests(tab)
    assert page in asked
    assert all(url == page or url.startswith("data:") for url in asked), asked
    assert column(tab, 1) == ["bitfit", "fedavg", "fedit", "head-only"] * 2
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_click_sorts_and_another_turns_round(tab, page):
    tab.open(page)
    head = "document.querySelectorAll('#results th')[3]"
    assert tab.evaluate(f"{head}.innerText").startswith("accuracy")
    for order in ("ascending", "descending"):
        tab.evaluate(f"{head}.querySelector('button').click()")
        assert tab.evaluate(f"{head}.getAttribute('aria-sort')") == order
        values = [float(text.split()[0]) for text in column(tab, 3)]
        assert values == sorted(values, reverse=order == "descending")
        assert len(set(values)) == 4
    assert complaints(tab) == []


def test_numbers_sort_as_numbers_and_empty_cells_are_last(tab, page):
    """To-target bytes: some rows reach the target, others have none."""
    tab.open(page)
    titles = tab.evaluate("[...document.querySelectorAll('#results th')].map(h => h.innerText)")
    place = titles.index("to target")
    for _ in range(2):
        tab.evaluate(f"document.querySelectorAll('#results th button')[{place}].click()")
        texts = column(tab, place)
        assert "-" in texts
        first = texts.index("-")
        assert set(texts[first:]) == {"-"}
        assert first > 0


def test_without_javascript_everything_is_there(tab, page):
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(page)
        document = tab.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
        for selector, count in (("#results tbody tr", 8), ("img", 4), ("th button", 0)):
            found = tab.call("DOM.querySelectorAll", nodeId=document, selector=selector)
            assert len(found["nodeIds"]) == count, selector
        assert complaints(tab) == []
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_probe_sees_what_it_looks_for(tab, tmp_path):
    """An error, a refused and a sent request are noticed: else the tests above could not fail."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("oh"); no()</script>')
    tab.open(bad.as_uri())
    assert "http://127.0.0.1:9/x.png" in requests(tab)
    assert len(complaints(tab)) >= 2
