"""From files or arrays to pairs of views on the device."""
