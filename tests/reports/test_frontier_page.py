"""The sweep's page: all that it must say, as text that no row can turn into markup, and without any network."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from frontier_rows import audited, control, failed, finished, sweep
from PIL import Image

from raytrust.reports.frontier_page import FrontierContext, page
from raytrust.reports.reconstructions import Drawn

TRUTH = np.random.default_rng(0).random((3, 1, 8, 8))
THREAT = {"vantage": "link", "batch_size": 1, "batch_norm": "eval", "labels": "known", "history": 0}


class Page(HTMLParser):
    """The tags, the addresses and the words of a page; fails on tags that don't match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open, words = [], [], [], []
        self.handle_data = words.append
        self.feed(text)
        assert self.open == []
        self.words = " ".join(" ".join(words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def context(**changes):
    drawn = [Drawn("none", TRUTH, [0.8] * 3, [True] * 3)]
    for attack, ssim in (("naive", 0.12), ("aware", 0.72)):
        drawn.append(Drawn("PowerSGD rank 1", 1 - TRUTH, [ssim] * 3, [ssim > 0.3] * 3, attack))
    values = {
        "title": "digits: what leaks",
        "data_summary": "1,437 images",
        "settings": {"Options": {"width": 16, "output": "results"}, "Versions": {"torch": "2.6"}},
        "originals": TRUTH,
        "drawn": drawn,
        "commands": [("More images", "python sweep.py --images 32"), ("Your data", "python sweep.py --data x.npz")],
        "failures": [("PowerSGD rank 1, naive attack", "all restarts diverged")],
        "timing": "12 min on 2 CPUs",
        "classes": 10,
    }
    return FrontierContext(**{**values, **changes})


def rows_of(rows):
    return [row | {"threat": THREAT} for row in rows]


def test_the_first_screen_has_the_answer_the_control_and_the_threat():
    words = Page(page(rows_of(audited()), context())).words
    first = words.partition("What the attacker gets to see")[0]
    for text in (
        "Of 10 defences, 8 leak, 1 resists the attacks tried, 1 undecided; 1 failed.",
        "PowerSGD rank 1 looks private to an attacker who ignores the compressor (SSIM 0.12), and leaks to one who",
        "Control: the attack works without compression: SSIM 0.80 (n = 8), +0.60 [+0.50, +0.70] over the floor 0.20",
        "The attacker sees what one worker sends in one training step",
        "ATOMO 1: SSIM 0.05 [-0.05, 0.15], accuracy 60.0 %, 9.0 kB a step",
        "Top-K 0.01 %: loss became NaN at step 120",
    ):
        assert text in first


def test_the_cards_count_as_the_answer_does():
    words = Page(page(rows_of(audited()), context())).words
    assert "Of 10 defences, 8 leak, 1 resists the attacks tried, 1 undecided; 1 failed." in words
    control = "Without compression, the control leaks, SSIM 0.80 [0.70, 0.90], accuracy 94.0 %, 1.4 MB a step"
    for text in (control, "Leaks: 8 ", "Resists the attacks tried: 1 ATOMO 1: SSIM", "Undecided: 1 signSGD: SSIM"):
        assert text in words
    assert "*: Pareto set, here 11 of 11 rows." in words


def test_every_number_of_a_row_stands_on_the_page():
    rows = rows_of(audited())
    rows[1]["remarks"] = ["sends more bytes than the gradient itself"]
    words = Page(page(rows, context())).words
    low, high = (100 * x for x in rows[1]["accuracy_interval"])
    for text in (
        f"92.4 [{low:.1f}, {high:.1f}]",
        "0.72 [0.62, 0.82]",
        "+0.52 [+0.42, +0.62]",
        "8 of 8",
        "12.3 kB",
        "72.1x",
        "aware tv=0.01 lr=0.1 r=2 s=0",
        "SSIM 0.72 (n = 8), +0.52 [+0.42, +0.62] over the floor 0.20, 8 of 8 identified among 100.",
        "Sends more bytes than the gradient itself.",
        "Accuracy 34 points below training without compression.",
        "Accuracy: test images, n = 360",
    ):
        assert text in words
    for text in ("results", "2.6", "12 min on 2 CPUs", "python sweep.py --images 32", "all restarts diverged"):
        assert text in words


def test_the_page_calls_nothing_private_where_the_attack_fails():
    text = page(rows_of([control(works=False), *sweep(6)]), context())
    words = Page(text).words
    assert "The attack fails here: nothing can be said about any defence, but that 2 leak; give it more" in words
    assert "Of 6 defences, 2 leak; of the other 4 nothing can be said." in words
    assert 'class="card resists"' not in text
    assert 'class="badge resists"' not in text
    assert "*: Pareto set" not in words
    assert "looks private" not in words


def test_the_page_warns_of_a_model_that_has_not_learnt():
    rows = rows_of([control() | {"accuracy": 0.12, "accuracy_interval": [0.09, 0.16]}, *sweep(2)])
    assert "accuracy near chance (10 %): the model has hardly learnt" in Page(page(rows, context())).words
    assert "hardly learnt" not in Page(page(rows_of(audited()), context())).words


def test_the_page_needs_no_network_and_its_pictures_are_those_of_the_attack():
    parsed = Page(page(rows_of(audited()), context()))
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(a.split(",")[1])))) for a in parsed.addresses]
    assert pictures[0].shape[1] == 1400  # the frontier
    original, none = pictures[1], pictures[4]
    assert np.array_equal(original[..., 0], np.round(255 * TRUTH[0, 0]))
    assert np.array_equal(none, original)
    assert np.array_equal(pictures[10][..., 1], np.round(255 * (1 - TRUTH[0, 0])))
    assert len(pictures) == 1 + 3 * (2 + 3)  # originals beside each of two defences


def test_photographs_are_embedded_small():
    truth = np.random.default_rng(1).random((1, 3, 224, 160))
    text = page(rows_of([control()]), context(originals=truth, drawn=[Drawn("none", truth, [1.0])]))
    assert len(text) < 400_000
    image = Image.open(io.BytesIO(base64.b64decode(Page(text).addresses[-1].split(",")[1])))
    assert image.size == (69, 96)


def test_no_row_can_write_markup():
    evil = "<script>alert(1)</script>\"'&"
    rows = rows_of([control(), finished(f"leaky {evil}", leakage=0.7), failed(f"failed {evil}", reason=evil)])
    rows[1]["remarks"] = [evil]
    changes = {"title": evil, "data_summary": evil, "threat": evil, "timing": evil, "commands": [(evil, evil)]}
    changes |= {"settings": {evil: {evil: evil}}, "failures": [(evil, evil)]}
    drawn = [Drawn(f"leaky {evil}", TRUTH, [0.5] * 3, None, "aware")]
    text = page(rows, context(**changes, drawn=drawn))
    assert "<script" not in text
    parsed = Page(text)
    assert "script" not in parsed.tags
    assert parsed.words.count("<script>alert(1)</script>\"'&") >= 12


@pytest.mark.parametrize("rows", [[], [failed()], [control(excess_interval=None, n_images=1, leakage_interval=None)]])
def test_a_page_of_little(rows):
    assert "nothing can be said about any defence" in Page(page(rows, FrontierContext("nothing yet"))).words


def test_a_page_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="Expected 'none' with"):
        page([control()], context(drawn=[Drawn("none", TRUTH[:1], [0.5])]))


def test_wide_things_scroll_inside_their_box():
    text = page(rows_of(audited()), context())
    for match in re.finditer(r"<table[^>]*>", text):
        before = text[: match.start()].rstrip()
        assert before.endswith(('<div class="wide">', "</h3>"))  # settings are tables of words, which wrap
