"""What a request passes through on its way in and out."""
