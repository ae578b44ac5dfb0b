"""What the pages say that the tiny presets take is what was measured."""

import json

from bench import tiny


def test_tables_in_the_pages_are_of_the_results():
    results, places = json.loads(tiny.PATH.read_text()), []
    for page in tiny.DOCS.glob("*.md"):
        for found in tiny.PLACE.finditer(page.read_text(encoding="utf-8")):
            places += found[2].split()
            assert found[0] == f"{found[1]}\n{tiny.table(found[2].split(), results)}\n{found[3]}", page
    assert sorted(places) == sorted(["pretrain", *tiny.TASKS])
