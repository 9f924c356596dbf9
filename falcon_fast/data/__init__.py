"""Turn image files or arrays into pairs of augmented views on the device."""
