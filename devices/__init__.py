"""Boards: one TOML file each, with the facts that plans and runtimes need. This folder's listing is the registry."""
