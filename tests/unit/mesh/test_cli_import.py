from __future__ import annotations

import json
from pathlib import Path

import pytest

from identity.errors import BadInput, NotFound, Refused
from mesh.cli_import import MAX_FILE, import_policy, read_source
from policy.imported import load_imported
from policy.inventory import load_inventory

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n"


def test_writes_three_files(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "deep" / "out"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "pod.yml").write_text("\ufeff" + POD)
    (source / "README").write_bytes(b"\xff not read")
    report = import_policy("kubernetes", source, out)
    assert json.loads((out / "report.json").read_text()) == report
    assert report["rules"]["in"] == 0
    assert load_imported("p", (out / "policy.yaml").read_text()).source == "kubernetes"
    names = [s.name for s in load_inventory("i", (out / "inventory.yaml").read_text())]
    assert names == ["default/p[Pod]", "external"]
    assert sorted(p.name for p in out.iterdir()) == ["inventory.yaml", "policy.yaml", "report.json"]


def test_a_refused_source_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text("{}")
    with pytest.raises(Refused) as caught:
        import_policy("nsx", tmp_path / "n.json", tmp_path / "out")
    assert caught.value.exit == 1
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no"):
        read_source("nsx", tmp_path / "absent")
    with pytest.raises(BadInput, match="wants one file"):
        read_source("nsx", tmp_path)
    with pytest.raises(NotFound, match="holds no file"):
        read_source("kubernetes", tmp_path)
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_source("kubernetes", tmp_path)
    with (tmp_path / "bad.yaml").open("wb") as large:
        large.truncate(MAX_FILE + 1)
    with pytest.raises(BadInput, match="larger than"):
        read_source("kubernetes", tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text(POD)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BadInput, match="cannot write"):
        import_policy("kubernetes", tmp_path / "pod.yaml", tmp_path / "out")
