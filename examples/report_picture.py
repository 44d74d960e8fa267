"""Take a picture of an HTML report with Chromium, as a reader has it before them; or print it.

    tncompress report tuned --data digits --html report.html
    python examples/report_picture.py report.html --out report.png
    python examples/report_picture.py report.html --out phone.png --width 375 --dark --whole
    python examples/report_picture.py report.html --out report.pdf

Needs playwright (`pip install playwright`) and the system's Chromium (Debian's package chromium).
"""

import argparse
import shutil
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """Return where the system's Chromium is, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def opened(path: Path, **options):
    """Yield the page that a file shows in a browser of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page: Page = browser.new_page(**options)
        page.goto(path.resolve().as_uri())
        yield page
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=Path("report.png"), help=".png, or .pdf to print")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=960)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true", help="the whole page, not the first screen")
    given = parser.parse_args()
    if chromium() is None:
        raise SystemExit(f"error: there is none of {', '.join(NAMES)}: apt-get install chromium")
    size = {"width": given.width, "height": given.height}
    with opened(given.report, viewport=size, color_scheme="dark" if given.dark else "light") as page:
        if given.out.suffix == ".pdf":
            page.pdf(path=given.out, format="A4", margin=dict.fromkeys(("top", "left", "right"), "12mm"))
        else:
            page.screenshot(path=given.out, full_page=given.whole)
    print(f"{given.out}: {given.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
