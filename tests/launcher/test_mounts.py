"""Mount points as mountinfo writes them."""

from broker.launcher.mounts import mounts_below, parse_mountinfo

TEXT = r"""27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
24 27 0:6 / /dev rw - devtmpfs devtmpfs rw
40 27 0:40 /a\040b /mnt/x\012y rw shared:1 - tmpfs tmpfs rw
41 27 0:41 / /mnt rw - tmpfs tmpfs rw
nonsense
"""


def test_a_name_may_hold_anything() -> None:
    mount = parse_mountinfo(TEXT)[2]
    assert (mount.device, mount.root, mount.point) == ("0:40", "/a b", "/mnt/x\ny")


def test_mounts_below_a_folder_but_not_itself() -> None:
    mounts = parse_mountinfo(TEXT)
    assert len(mounts) == 4
    assert mounts_below("/mnt", mounts) == ["/mnt/x\ny"]
    assert mounts_below("/", mounts) == ["/dev", "/mnt", "/mnt/x\ny"]
    assert mounts_below("/mn", mounts) == []
