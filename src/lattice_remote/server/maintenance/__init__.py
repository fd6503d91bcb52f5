"""Administrative commands: export, import, rename, archive, fsck."""
