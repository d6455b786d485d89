"""The configuration a kernel runs with is a plain function of tables, architecture and shape."""

from __future__ import annotations

import json

import pytest

from moe.errors import ConfigError
from moe.kernels import triton_configs
from moe.kernels.triton_configs import KERNELS, SHARED_KIB, Config, Entry, bucket, choose, lookup, own_table, read, row, use

SMALL, LARGE, WIDE = Config(64, 64, 64, 4, 3), Config(128, 128, 64, 8, 3), Config(128, 256, 64, 8, 3)


def entry(config: Config, n=None, k=None, rows=512, kernel="down", arch=90, itemsize=2) -> Entry:
    return Entry(kernel, arch, itemsize, n, k, rows, config)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """No test sees the table of whoever runs it, nor leaves one behind."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(triton_configs.TABLE, raising=False)
    use(b"")
    yield
    use(b"")
    triton_configs._given.clear()


def table(*entries: Entry) -> bytes:
    return json.dumps({"entries": [row(e) for e in entries]}).encode()


@pytest.mark.parametrize("arch", [80, 86, 87, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_configuration_for_every_architecture_and_size(kernel, arch, itemsize):
    for n, k, rows in ((16, 16, 0), (768, 2048, 512), (14336, 4096, 8192)):
        config = lookup(kernel, arch, n, k, rows, itemsize)
        assert config.tma <= (arch in (90, 100, 103)), "tensor descriptors need Hopper"


def test_shipped_table_has_at_most_four_configurations_a_kernel_and_names_no_shape_twice():
    entries = read(triton_configs.SHIPPED.read_bytes(), "shipped")
    assert len({e[:-1] for e in entries}) == len(entries)
    for kernel in KERNELS:
        for arch in SHARED_KIB:
            assert 1 <= len({e.config for e in entries if (e.kernel, e.arch, e.itemsize) == (kernel, arch, 2)}) <= 4


def test_nearest_width_counts_before_nearest_rows():
    shipped = [entry(LARGE, n=256, rows=512), entry(SMALL, n=256, rows=32), entry(WIDE, n=2048, rows=512)]
    assert choose([], shipped, "down", 90, 2048, 64, 16) == WIDE
    assert choose([], shipped, "down", 90, 300, 64, 512) == LARGE
    assert choose([], shipped, "down", 90, 300, 64, 64) == SMALL
    assert choose([], shipped, "down", 90, 300, 64, 128) == SMALL, "two doublings from either: the one for fewer rows"


def test_own_table_counts_for_exactly_the_shapes_it_was_measured_with():
    own, shipped = [entry(WIDE, n=768, k=2048, rows=512)], [entry(LARGE)]
    assert choose(own, shipped, "down", 90, 768, 2048, 4096) == WIDE
    assert choose(own, shipped, "down", 90, 768, 4096, 4096) == LARGE
    assert choose(own, shipped, "down", 90, 1024, 2048, 512) == LARGE


def test_a_kernel_without_a_fitting_entry_is_refused_by_name():
    with pytest.raises(ConfigError, match="no configuration of kernel down for architecture 80"):
        choose([], [entry(LARGE)], "down", 80, 768, 2048, 512)
    with pytest.raises(ConfigError, match=r"this GPU has 7\.5"):
        lookup("down", 75, 768, 2048, 512)


@pytest.mark.parametrize(("f", "blocks"), [(256, 2), (768, 2), (1024, 2), (1408, 2), (1536, 1), (2048, 1), (14336, 1)])
def test_narrow_experts_take_tiles_of_which_a_multiprocessor_holds_two(f, blocks):
    """Over f steps of 64 the end of a tile is a large part of it; a second block multiplies meanwhile."""
    width = (256, 128)[blocks - 1]
    down, up_dgrad, up = lookup("down", 90, 2048, f, 512), lookup("up_dgrad", 90, 2048, 2 * f, 512), lookup("up", 90, f, 2048, 512)
    assert (width, width) == (down.BLOCK_N, up_dgrad.BLOCK_N)
    assert (64 if f < 724 else 128) == up.BLOCK_N, "its contracted width is the model's: only where columns are few"


@pytest.mark.parametrize(("rows", "expected"), [(0, 1), (1, 1), (3, 4), (90, 64), (91, 128), (512, 512), (700, 512), (8192, 8192)])
def test_rows_fall_into_buckets_by_ratio(rows, expected):
    assert bucket(rows) == expected


def test_entries_survive_a_table():
    entries = (entry(WIDE._replace(tma=True, group_m=4), n=768, k=2048), entry(SMALL, kernel="wgrad", itemsize=4, rows=1))
    assert read(table(*entries), "table") == entries


def test_the_first_ranks_table_replaces_the_one_on_this_ranks_disk():
    triton_configs.table_path().parent.mkdir()
    triton_configs.table_path().write_bytes(table(entry(SMALL, n=768, k=2048)))
    use(table(entry(WIDE, n=768, k=2048)))
    assert lookup("down", 90, 768, 2048, 512) == WIDE
    use(b"")
    assert lookup("down", 90, 768, 2048, 512) not in (SMALL, Config(128, 256, 64, 8, 3))
    use(own_table())
    assert lookup("down", 90, 768, 2048, 512) == SMALL


def test_own_table_lies_in_the_users_settings_unless_the_environment_names_another(tmp_path, monkeypatch):
    assert triton_configs.table_path() == tmp_path / "moe" / "triton.json"
    assert own_table() == b"", "there need not be one"
    monkeypatch.setenv(triton_configs.TABLE, str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match=r"other\.json cannot be read"):
        own_table()
    (tmp_path / "other.json").write_bytes(table(entry(SMALL)))
    assert own_table() == table(entry(SMALL))


@pytest.mark.parametrize(
    "change",
    [{"tile": [100, 64, 64]}, {"tile": [True, 64, 64]}, {"warps": 3}, {"stages": 0}, {"group_m": 0}, {"kernel": "sideways"}, {"arch": 70}],
)
def test_a_damaged_table_is_refused_by_its_name(change):
    text = json.dumps({"entries": [row(entry(SMALL)) | change]}).encode()
    with pytest.raises(ConfigError, match=r"mine\.json is not a table of kernel configurations"):
        read(text, "mine.json")


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"entries": [{}]}', b'{"entries": 3}', b"\xff"])
def test_something_else_than_a_table_is_refused_by_its_name(text):
    with pytest.raises(ConfigError, match=r"mine\.json is not a table of kernel configurations"):
        read(text, "mine.json")
