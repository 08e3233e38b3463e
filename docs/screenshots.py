"""Screenshots of the page of ``tripletjax serve``, by a headless Chromium.

tripletjax serve --run RUN --index FOLDER
python docs/screenshots.py --image FOLDER/class/one.png --other FOLDER/class/two.png
"""

import argparse
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", default="http://127.0.0.1:7860")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    arguments = parser.parse_args()
    options = webdriver.ChromeOptions()
    for option in (
        "headless=new",
        "no-sandbox",
        "window-size=680,1000",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{option}")
    with tempfile.TemporaryDirectory() as profile:
        options.add_argument(f"--user-data-dir={profile}")
        browser = webdriver.Chrome(options=options)
        wait = WebDriverWait(browser, 60)

        def shown(element: str, count: int) -> bool:
            selector = f"#{element} img"
            return len(browser.find_elements(By.CSS_SELECTOR, selector)) >= count

        def upload(element: str, file: Path) -> None:
            selector = f"#{element} input[type=file]"
            wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, selector))
            field = browser.find_element(By.CSS_SELECTOR, selector)
            field.send_keys(str(file.resolve()))

        def tab(name: str) -> None:
            buttons = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
            next(one for one in buttons if one.text == name).click()

        def save(name: str) -> None:
            time.sleep(1)
            browser.save_screenshot(str(arguments.out / f"page_{name}.png"))

        try:
            browser.get(arguments.page)
            upload("search-file", arguments.image)
            wait.until(lambda b: shown("search-hits", 1) and shown("search-sample", 1))
            save("search")
            tab("Verify")
            upload("verify-first", arguments.image)
            upload("verify-second", arguments.other)
            wait.until(lambda b: shown("verify-pair", 2))
            save("verify")
            tab("Identify")
            upload("identify-file", arguments.other)
            wait.until(lambda b: shown("identify-nearest", 2))
            save("identify")
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
