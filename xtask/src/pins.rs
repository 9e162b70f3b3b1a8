//! Every version and checksum that the commands rely on: the one home of "which".
//!
//! A pinned file is checked against its SHA-256 before it is used, whoever served it. To add a PyTorch release, add a
//! [`TorchRelease`] to [`RELEASES`] and a patch beside the others in `patches/`.

use anyhow::{Result, anyhow};

/// One file of a Python package as the package index serves it.
pub struct PinnedWheel {
    /// The wheel's Python tag, `cp311` say; `py3` where any Python will do.
    pub python: &'static str,
    /// The machine it is for, as `uname -m` calls it.
    pub machine: &'static str,
    pub sha256: &'static str,
}

/// A Python package at one version, with the checksums of the files we may be served.
pub struct PinnedPackage {
    pub name: &'static str,
    pub version: &'static str,
    pub wheels: &'static [PinnedWheel],
}

/// A Debian source package's upstream tarball.
pub struct PinnedSource {
    /// The source package's name and version, as `apt-get source` takes them.
    pub package: &'static str,
    pub version: &'static str,
    /// The Debian release that carries it.
    pub suite: &'static str,
    /// The tarball's name as apt writes it.
    pub tarball: &'static str,
    /// The one folder inside the tarball.
    pub folder: &'static str,
    pub sha256: &'static str,
}

/// A PyTorch release that can be given our allocator.
pub struct TorchRelease {
    pub torch: PinnedPackage,
    pub source: PinnedSource,
    /// Our patch, relative to the repository's root.
    pub patch: &'static str,
    /// The packages whose `include/` folders hold the CUDA headers this release was built with.
    pub cuda_headers: &'static [PinnedPackage],
    /// Python versions that the release has wheels for, inclusive.
    pub python: ((u32, u32), (u32, u32)),
}

impl TorchRelease {
    pub fn version(&self) -> &'static str {
        self.torch.version
    }
}

impl PinnedPackage {
    /// The package as a line of a pip requirements file that pip checks the checksums of (`--require-hashes`).
    pub fn requirement(&self) -> String {
        let hashes: String = self.wheels.iter().map(|wheel| format!(" --hash=sha256:{}", wheel.sha256)).collect();
        format!("{}=={}{hashes}", self.name, self.version)
    }

    pub fn wheel_for(&self, python: &str, machine: &str) -> Option<&'static PinnedWheel> {
        let wheels: &'static [PinnedWheel] = self.wheels;
        wheels.iter().find(|wheel| (wheel.python == python || wheel.python == "py3") && wheel.machine == machine)
    }
}

/// The release called `version`, or an error that lists those there are.
pub fn release(version: &str) -> Result<&'static TorchRelease> {
    RELEASES.iter().find(|release| release.version() == version).ok_or_else(|| {
        let known: Vec<_> = RELEASES.iter().map(TorchRelease::version).collect();
        anyhow!("--torch {version}: no patch for this release of PyTorch; there is one for {}", known.join(", "))
    })
}

/// The release that commands take when none is named.
pub const DEFAULT_TORCH: &str = "2.6.0";

const fn wheel(python: &'static str, machine: &'static str, sha256: &'static str) -> PinnedWheel {
    PinnedWheel { python, machine, sha256 }
}

pub const RELEASES: &[TorchRelease] = &[TorchRelease {
    torch: PinnedPackage {
        name: "torch",
        version: "2.6.0",
        // For aarch64 the package index has this release without CUDA only: `wheel --official FILE` takes another.
        wheels: &[
            wheel("cp39", "x86_64", "9ea955317cfcd3852b1402b62af258ce735c2edeee42ca9419b6bc889e5ae053"),
            wheel("cp310", "x86_64", "6860df13d9911ac158f4c44031609700e1eba07916fff62e21e6ffa0a9e01961"),
            wheel("cp311", "x86_64", "7979834102cd5b7a43cc64e87f2f3b14bd0e1458f06e9f88ffa386d07c7446e1"),
            wheel("cp312", "x86_64", "2bb8987f3bb1ef2675897034402373ddfc8f5ef0e156e2d8cfc47cacafdda4a9"),
            wheel("cp313", "x86_64", "4874a73507a300a5d089ceaff616a569e7bb7c613c56f37f63ec3ffac65259cf"),
        ],
    },
    source: PinnedSource {
        package: "pytorch",
        version: "2.6.0+dfsg-7",
        suite: "trixie",
        tarball: "pytorch_2.6.0+dfsg.orig.tar.xz",
        folder: "pytorch-v2.6.0",
        sha256: "099a9601bc40d67656e75735c44abedb0fbe92d08817852ab7472eebb7e6ddff",
    },
    patch: "patches/pytorch-2.6.patch",
    cuda_headers: &[
        PinnedPackage {
            name: "nvidia-cuda-runtime-cu12",
            version: "12.4.127",
            wheels: &[
                wheel("py3", "x86_64", "64403288fa2136ee8e467cdc9c9427e0434110899d07c779f25b5c068934faa5"),
                wheel("py3", "aarch64", "961fe0e2e716a2a1d967aab7caee97512f71767f852f67432d572e36cb3a11f3"),
            ],
        },
        // Only for crt/: no compiler of NVIDIA's runs here.
        PinnedPackage {
            name: "nvidia-cuda-nvcc-cu12",
            version: "12.4.131",
            wheels: &[
                wheel("py3", "x86_64", "e4c9a35435c3b0e36c6397c5696334c9ea6650e524736cbd1c5d345ea099bb04"),
                wheel("py3", "aarch64", "00ba32f3d7928548455baa877e748a4676ba0731cfc73d4213336fc67bdc87e9"),
            ],
        },
        PinnedPackage {
            name: "nvidia-nvml-dev-cu12",
            version: "12.4.127",
            wheels: &[
                wheel("py3", "x86_64", "f3d070140734992f018d46b5fc1663495898637534b94a87cec64bf12bdc584c"),
                wheel("py3", "aarch64", "fb7d008ef4d96e7beb76e3a6e86a11dacdae6164cb5223b393e8382f2e10498f"),
            ],
        },
    ],
    python: ((3, 9), (3, 13)),
}];

/// What compiles `libc10_cuda`, in a virtual environment of its own so that neither root nor a recent system is needed.
pub const BUILD_TOOLS: &[&str] = &["cmake==4.4.4", "ninja==1.13.2"];

/// What the demo and the tests import beside PyTorch itself.
pub const TEST_PACKAGES: &[&str] = &["numpy", "pytest", "expecttest", "hypothesis", "psutil", "ninja"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirement_lists_every_checksum() {
        let line = release("2.6.0").unwrap().torch.requirement();
        assert!(line.starts_with("torch==2.6.0 --hash=sha256:9ea9"));
        assert_eq!(line.matches("--hash=sha256:").count(), 5);
    }

    #[test]
    fn checksums_are_whole() {
        for release in RELEASES {
            let packages = std::iter::once(&release.torch).chain(release.cuda_headers);
            let sums = packages.flat_map(|package| package.wheels.iter().map(|wheel| wheel.sha256));
            for sum in sums.chain([release.source.sha256]) {
                assert!(sum.len() == 64 && sum.bytes().all(|c| c.is_ascii_hexdigit()), "{sum}");
            }
        }
    }

    #[test]
    fn unknown_release_names_the_known_ones() {
        let error = release("1.13.0").map(TorchRelease::version).unwrap_err().to_string();
        assert!(error.contains("1.13.0") && error.contains("2.6.0"), "{error}");
    }

    #[test]
    fn wheel_for_matches_python_and_machine() {
        let release = release("2.6.0").unwrap();
        assert!(release.torch.wheel_for("cp311", "x86_64").is_some());
        assert!(release.torch.wheel_for("cp38", "x86_64").is_none());
        assert!(release.torch.wheel_for("cp311", "aarch64").is_none());
        assert!(release.cuda_headers[0].wheel_for("cp311", "x86_64").is_some());
    }
}
