"""The data plane: runs planned steps on a device."""
