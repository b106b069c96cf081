"""Files and folders: written whole or not at all, and locked against a second process."""
