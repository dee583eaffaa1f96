"""What is said in public of data sets and models."""

import pytest

from bissl_hf.data.naming import PublicName, hub_repository, public_name


def test_a_hub_id_is_known_by_it():
    name = "uoft-cs/cifar10"
    assert hub_repository(name) == name
    assert public_name(name) == PublicName(name, name, name)


def test_a_short_name_stands_for_what_it_means(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_name("digits") == PublicName("the digits of scikit-learn", "digits")
    name = public_name("food101")
    assert (name.title, name.identifier, name.repository) == ("Food-101", "ethz/food101", "ethz/food101")
    assert name.splits["test"] == "validation"
    assert (public_name("cifar100").config, len(public_name("cifar100").revision)) == ("cifar100", 40)


def test_a_title_stays():
    assert public_name("My own set, 2nd part") == PublicName("My own set, 2nd part", "my-own-set-2nd-part")
    assert public_name("???").identifier is None
    assert public_name("long " * 100).title == "long " * 100


def test_folders_and_files_are_not_named(tmp_path, monkeypatch):
    (tmp_path / "user" / "images" / "cat").mkdir(parents=True)
    (tmp_path / "user" / "tables").mkdir()
    (tmp_path / "user" / "tables" / "train.parquet").touch()
    monkeypatch.chdir(tmp_path)
    for base in ("user", str(tmp_path / "user")):
        assert public_name(f"{base}/images") == PublicName("a folder of images", "imagefolder")
        assert public_name(f"{base}/tables") == PublicName("Parquet files", "parquet")
        assert public_name(f"{base}/tables/train.parquet") == PublicName("Parquet files", "parquet")
    assert hub_repository("user/images") is None


@pytest.mark.parametrize(
    "name", ["/data/secret", "a/b/c", "./images", "..\\images", "~/images", "~nobody/images", "user/--name", "a/b..c"]
)
def test_paths_that_are_not_there_are_not_named_either(name):
    assert hub_repository(name) is None
    assert public_name(name) == PublicName("local files")


@pytest.mark.parametrize("name", [None, "", "digits", "resnet-18"])
def test_what_has_no_owner_is_no_hub_id(name):
    assert hub_repository(name) is None
