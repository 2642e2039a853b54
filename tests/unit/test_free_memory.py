"""engine/memory.py: what is free, on a made-up machine of files below a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from vidlm.engine import memory
from vidlm.engine.memory import host_free_bytes

GIB = 1 << 30
MACHINE = 64  # GiB
V2 = "31 23 0:28 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"
CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
NONE_V1 = "9223372036854771712"
Files = Mapping[str, str]


@pytest.fixture(autouse=True)
def _no_limits_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.resource is not None
    monkeypatch.setattr(
        memory.resource, "getrlimit", lambda _: (memory.resource.RLIM_INFINITY,) * 2
    )


def machine(folder: Path, groups: str, mounts: str, files: Files | None = None) -> Path:
    """/proc and /sys with these groups, mounts and files of groups."""
    available = MACHINE * GIB // 1024
    proc = {
        "proc/meminfo": f"MemTotal: {2 * available} kB\nMemAvailable:   {available} kB\n",
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": f"23 1 8:1 / / rw - ext4 /dev/sda rw\n{CPU}\n{mounts}\n",
        "proc/self/statm": "1000 500 100 10 0 800 0\n",
    }
    for name, text in {
        **proc,
        **{f"sys/fs/cgroup/{k}": v for k, v in (files or {}).items()},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def v2(group: str, limit: object, used: int = 0, files: int = 0, high: object = "max") -> Files:
    """A group of cgroup v2, in GiB."""
    sizes = {"max": limit, "high": high, "current": used}
    written = {n: str(x * GIB) if isinstance(x, int) else str(x) for n, x in sizes.items()}
    stat = f"anon 5\nactive_file 7\ninactive_file {files * GIB}\n"
    return {f"{group}memory.{name}": f"{x}\n" for name, x in {**written, "stat": stat}.items()}


def v1(group: str, limit: object, used: int = 0, files: int = 0, above: object = None) -> Files:
    def size(x: object) -> str:
        return str(x * GIB) if isinstance(x, int) else str(x)

    stat = f"cache 3\ninactive_file 1\ntotal_inactive_file {files * GIB}\n"
    if above is not None:
        stat += f"hierarchical_memory_limit {size(above)}\n"
    named = {"limit_in_bytes": size(limit), "usage_in_bytes": size(used), "stat": stat}
    return {f"memory/{group}memory.{name}": f"{x}\n" for name, x in named.items()}


CASES: dict[str, tuple[str, str, Files, int]] = {
    "no limit": ("0::/\n", V2.format(root="/"), {}, MACHINE),
    "v2, root of a container": ("0::/\n", V2.format(root="/"), v2("", 8, 3, 1), 6),
    "v2, nested": (
        "0::/user/job\n",
        V2.format(root="/"),
        {**v2("user/", 20, 10), **v2("user/job/", 9, 4)},
        5,
    ),
    "v2, a group above is tighter": (
        "0::/user/job\n",
        V2.format(root="/"),
        {**v2("user/", 12, 10, 1), **v2("user/job/", 9, 4)},
        3,
    ),
    "v2, no limit of its own": (
        "0::/user/job\n",
        V2.format(root="/"),
        {**v2("user/", 12, 10), **v2("user/job/", "max", 4)},
        2,
    ),
    "v2, throttled before": ("0::/a\n", V2.format(root="/"), v2("a/", 9, 1, high=4), 3),
    "v2, used beyond": ("0::/a\n", V2.format(root="/"), v2("a/", 4, 5), 0),
    "v2, all of it files": ("0::/a\n", V2.format(root="/"), v2("a/", 4, 4, 4), 4),
    "v2, more than the machine": ("0::/a\n", V2.format(root="/"), v2("a/", 1000), MACHINE),
    "v2, host's path in a container": (
        "0::/kubepods/pod1/abc\n",
        V2.format(root="/kubepods/pod1/abc"),
        v2("", 6, 2),
        4,
    ),
    "v2, below what a container sees": (
        "0::/kubepods/abc/inner\n",
        V2.format(root="/kubepods/abc"),
        {**v2("", 6, 2), **v2("inner/", 3, 2)},
        1,
    ),
    "v2, a path that is not there": ("0::/docker/abc\n", V2.format(root="/"), v2("", 6, 2), 4),
    "v2, a path outside the mount": ("0::/other\n", V2.format(root="/docker"), v2("", 6, 2), 4),
    "v2, a path above the namespace": ("0::/../../x\n", V2.format(root="/"), v2("", 6, 2), 4),
    "v1, root of a container": ("4:memory:/\n", V1.format(root="/"), v1("", 8, 3, 1), 6),
    "v1, nested": (
        "4:memory:/api/job\n",
        V1.format(root="/"),
        {**v1("", NONE_V1, 30), **v1("api/", 20, 17), **v1("api/job/", 9, 4)},
        3,
    ),
    "v1, together with others": (
        "4:cpu,memory:/job\n",
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory",
        v1("job/", 9, 4),
        5,
    ),
    "v1, a limit above what is seen": (
        "4:memory:/docker/abc\n",
        V1.format(root="/docker/abc"),
        v1("", NONE_V1, 1, above=5),
        4,
    ),
    "v1, without a hierarchy": (
        "4:memory:/api/job\n",
        V1.format(root="/"),
        {**v1("api/", 3, 2), "memory/api/memory.use_hierarchy": "0\n", **v1("api/job/", 9, 4)},
        5,
    ),
    "v1, unlimited": ("4:memory:/a\n", V1.format(root="/"), v1("a/", NONE_V1, 4), MACHINE),
    "hybrid, memory in v1": (
        "4:memory:/a\n0::/b\n",
        f"{V1.format(root='/')}\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        {**v1("a/", 7, 1), "unified/b/cgroup.procs": "1\n"},
        6,
    ),
    "hybrid, both limit": (
        "4:memory:/a\n0::/b\n",
        f"{V1.format(root='/')}\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        {**v1("a/", 7, 1), **v2("unified/b/", 5, 1)},
        4,
    ),
    "another hierarchy's group": (
        "3:cpu:/tight\n4:memory:/a\n1:name=memory:/tight\n",
        V1.format(root="/"),
        {**v1("tight/", 1), **v1("a/", 9, 4)},
        5,
    ),
    "a mount point with a space": (
        "0::/a\n",
        "31 23 0:28 / /sys/fs/cgroup/my\\040groups rw - cgroup2 cgroup2 rw",
        v2("my groups/a/", 5, 1),
        4,
    ),
    "nothing but the usual folders": ("", "", v2("", 5, 1), 4),
    "nothing but the usual folders, v1": ("", "", v1("", 5, 1), 4),
    "garbage in a limit": ("0::/a\n", V2.format(root="/"), v2("a/", "\x00lots"), MACHINE),
    "an empty limit": ("0::/a\n", V2.format(root="/"), v2("a/", ""), MACHINE),
    "a negative limit": ("0::/a\n", V2.format(root="/"), v2("a/", "-1"), MACHINE),
    "an endless number": ("0::/a\n", V2.format(root="/"), v2("a/", "9" * 9999), MACHINE),
    "no usage": ("0::/a\n", V2.format(root="/"), {"a/memory.max": f"{5 * GIB}\n"}, 5),
    "garbage in /proc": ("::\n\n0\nx:y\n", "a b c - d\n- - -\n" * 3, v2("", 5, 1), 4),
    "garbage in stat": (
        *("0::/a\n", V2.format(root="/")),
        {**v2("a/", 5, 1), "a/memory.stat": "inactive_file\ninactive_file x\n\xff\n"},
        4,
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_what_control_groups_leave(tmp_path: Path, name: str) -> None:
    groups, mounts, files, left = CASES[name]
    assert host_free_bytes(machine(tmp_path, groups, mounts, files)) == left * GIB


@pytest.mark.parametrize("which", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_what_limits_of_the_process_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    root, resource = machine(tmp_path, "0::/\n", V2.format(root="/")), memory.resource
    assert resource is not None
    wanted = getattr(resource, which)
    monkeypatch.setattr(memory.os, "sysconf", lambda _: 1 << 20)
    most = {wanted: 5 * GIB}
    monkeypatch.setattr(
        resource, "getrlimit", lambda limit: (most.get(limit, resource.RLIM_INFINITY), 0)
    )
    held = {"RLIMIT_AS": 1000, "RLIMIT_DATA": 800}[which]  # pages of 1 MiB
    assert host_free_bytes(root) == 5 * GIB - (held << 20)
    most[wanted] = GIB >> 2
    assert host_free_bytes(root) == 0


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("MemFree: 1048576 kB\nBuffers: 1024 kB\nCached: 1048576 kB\n", 2 * GIB + (1 << 20)),
        ("MemAvailable: lots\n", memory.UNKNOWN),
        ("", memory.UNKNOWN),
    ],
)
def test_a_machine_that_says_less(tmp_path: Path, text: str, left: int) -> None:
    root = machine(tmp_path, "0::/\n", V2.format(root="/"))
    (root / "proc/meminfo").write_text(text)
    assert host_free_bytes(root) == left
    (root / "proc/self/statm").write_text("x\n")
    assert host_free_bytes(root) == left


def test_no_linux(tmp_path: Path) -> None:
    assert host_free_bytes(tmp_path) > 0


def test_here() -> None:
    assert 1 << 20 < host_free_bytes() < 1 << 50
