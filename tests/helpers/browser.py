"""HTML reports as a real browser renders them."""

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000"),
]


def seen(page, width=1280):
    """(what a browser of that width shows: sections, plots with sizes, texts and more; its console messages)."""
    folder = page.parent
    measure = """<script>
    const size = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
    parent.postMessage(JSON.stringify({
      scroll: document.documentElement.scrollWidth,
      client: document.documentElement.clientWidth, width: innerWidth, title: document.title,
      sections: [...document.querySelectorAll("main > article")].map(e => e.id),
      plots: [...document.querySelectorAll("figure")].map(e => [e.id, ...size(e.querySelector("svg"))]),
      texts: Object.fromEntries([...document.querySelectorAll("header, article")].map(e => [e.id, e.innerText])),
      supervised: [...document.querySelectorAll("#masks section")].map(
        e => [...e.querySelectorAll("pre .k2, pre .k3")].map(t => t.textContent).join("")),
      paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    }), "*")</script></body>"""
    (folder / "measured.html").write_text(page.read_text(encoding="utf-8").replace("</body>", measure))
    (folder / "frame.html").write_text(
        "<!doctype html><meta charset=utf-8><pre id=found></pre><script>addEventListener('message', e => {"
        "document.getElementById('found').textContent = encodeURIComponent(e.data); })</script>"
        f"<iframe src=measured.html width={width} height=800 style='border:0'></iframe>"
    )
    command = [BROWSER, *QUIET, f"--user-data-dir={folder}/browser", "--enable-logging=stderr", "--dump-dom"]
    command += ["--window-size=1400,900", f"file://{folder}/frame.html"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unquote(re.search(r'id="found">([^<]+)<', result.stdout)[1])), console
