"""Modules with the functions of other projects' extensions, on this package's ops."""
