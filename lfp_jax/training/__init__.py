"""How the bundled demo generators and their classifier are made."""
