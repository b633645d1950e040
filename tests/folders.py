"""Anybody's pictures as a Pack, in a line: options of reading and of building are told apart by their names."""
from dataclasses import fields
from pathlib import Path

from medvis.data.sets.folder import FOLDER, _FolderConfig
from medvis.data.pack import Pack
from medvis.data.source import BuildConfig, DataSet, ReadConfig, prepare_source

BUILD = {one.name for one in fields(BuildConfig)}


def picture_pack(data_set: DataSet, read: ReadConfig, out: Path, **build) -> Pack:
    return prepare_source(data_set, read, BuildConfig(out, **{"progress": False, **build}))


def folder_pack(table: Path, out: Path, **options) -> Pack:
    "The Pack of a table whose pictures lie beside it, or below `root`."
    build = {name: options.pop(name) for name in BUILD & set(options)}
    return picture_pack(FOLDER, _FolderConfig(**{"root": table.parent, "table": table, **options}), out, **build)
