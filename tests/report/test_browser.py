"""The page in a real browser: the picker works on hostile text, and no policy is violated."""

import re
import shutil
import subprocess

import pytest

from ffnprobe.report import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--dump-dom",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture
def opened(tmp_path):
    def open_page(arguments, hash: str) -> tuple[str, str]:
        """The document after its script ran, and what the console said."""
        page = write_page(tmp_path / "report.html", *arguments)
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"{page.as_uri()}{hash}"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return run.stdout, "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)

    return open_page


def test_a_link_opens_its_neuron(opened, about, results, neurons):
    document, console = opened((about, results, neurons), "#5.1535")
    assert '<p id="status" role="status" class="muted">Neuron 5.1535</p>' in document
    assert 'The ship sailed into the<span class="space">⏎</span><mark> harbour</mark> at dawn' in document
    assert not console


@pytest.mark.parametrize("hash", ["#99.1", "#5.1535.1", "#<img src=x onerror=alert(1)>", "#__proto__", "#5.-1"])
def test_a_link_to_no_neuron_shows_the_first(opened, about, results, neurons, hash):
    document, console = opened((about, results, neurons), hash)
    assert re.search('id="status"[^<]*(Neuron 0.0|Shown: 0.0)</p>', document)
    assert not console


def test_hostile_text_stays_text(opened, dressed, attacks):
    document, console = opened(dressed(attacks), "#3.1")
    assert "Neuron 3.1" in document and "<mark>&lt;/script&gt;&lt;img src=x" in document
    assert "<title>&lt;/script&gt;" in document  # nothing has set it to "owned"
    assert "<svg" not in document.split("<main")[1].split("<script")[0]
    assert not console
