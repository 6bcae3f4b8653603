"""Boards: one TOML file each with the facts that plans and runtimes need. The listing of this folder is the registry."""
