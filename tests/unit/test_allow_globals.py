"""What an operator allows by `[tenants] allow_globals` reaches the allow-list in the list's own words."""

from __future__ import annotations

from fractions import Fraction

from node.app import allowlist_line
from tenants.unpickle import Allowlist


def test_a_dotted_name_of_the_config_is_a_line_of_the_list() -> None:
    allowed = Allowlist.shipped(extra=[allowlist_line("fractions.Fraction")])
    assert allowed.find("fractions", "Fraction") is Fraction


def test_the_module_may_be_nested() -> None:
    assert allowlist_line("xml.dom.minidom.Node") == "xml.dom.minidom Node"
