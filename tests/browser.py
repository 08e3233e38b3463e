"""A headless browser, if the system has one."""

import json
import shutil

import pytest
from selenium import webdriver

# Without these it looks for hosts of its makers at every start.
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--window-size=1200,1000"),
)

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

needs_browser = pytest.mark.skipif(
    None in (CHROMIUM, DRIVER), reason="there is no chromium with its chromedriver"
)


def open_browser(profile):
    """Chromium with an empty profile, and a record of its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    return webdriver.Chrome(options=options, service=service)


def asked_for(browser):
    """The addresses of all requests so far."""
    messages = [json.loads(e["message"]) for e in browser.get_log("performance")]
    return [
        message["message"]["params"]["request"]["url"]
        for message in messages
        if message["message"]["method"] == "Network.requestWillBeSent"
    ]
