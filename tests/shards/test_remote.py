"""Addresses as they may be shown: nothing secret in them."""

import pytest

from shards import ShardError, open_set
from shards.remote import Remote, shown


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("s3://bucket/set", "s3://bucket/set"),
        ("https://me:pass@host/set", "https://host/set"),
        ("https://me:p@ss@host:8080/set", "https://host:8080/set"),
        ("https://token@host/set", "https://host/set"),
        ("s3://KEY:SEC/RET@bucket/set", "s3://bucket/set"),
        ("https://host/set?sv=1&sig=abc%3D", "https://host/set"),
        ("simplecache::https://me:pass@host/set?sig=x", "simplecache::https://host/set"),
        ("https://host:8080/a@b/set", "https://host:8080/a@b/set"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("/a/me:pass@host/set?x", "/a/me:pass@host/set?x"),
        (
            "shards:\n- https://me:pass@host/a?sig=x\n- 'https://host/b?sig=y'\nname: a?b",
            "shards:\n- https://host/a\n- 'https://host/b'\nname: a?b",
        ),
        ("401, url='https://host/a?sig=x'", "401, url='https://host/a'"),
    ],
)
def test_addresses_are_shown_without_secrets(address, wanted):
    assert shown(address) == wanted


def test_a_secret_is_in_no_error_and_in_no_name():
    with pytest.raises(ShardError) as error:
        open_set("memory://me:S3CRET@host/none?sig=S3CRET")
    assert str(error.value).startswith("memory://host/none/manifest.json: no such file")
    with pytest.raises(ShardError) as error:
        open_set("nonsense://me:S3CRET@host/none")
    assert "S3CRET" not in str(error.value) and "nonsense://host/none" in str(error.value)


def test_a_signature_belongs_behind_each_file(monkeypatch):
    remote, asked = Remote("memory://host/set?sig=abc"), []
    monkeypatch.setattr(remote.files, "cat_file", lambda path, start, end: asked.append(path) or b"x")
    remote.read("latents/0.tar", 0, 1)
    assert asked == ["/host/set/latents/0.tar?sig=abc"]
