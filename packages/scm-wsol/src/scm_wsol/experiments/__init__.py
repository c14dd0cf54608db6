"""One module per table or figure of the paper."""

from attnmap_core.cli import Reproduction

REPRODUCTIONS: dict[str, Reproduction] = {}
