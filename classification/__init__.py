"""Bird classification on CUB-200-2011 with timm."""
