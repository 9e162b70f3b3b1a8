//! Every version and checksum that the commands rely on: the one home of "which".
//!
//! A pinned file is checked against its SHA-256 before it is used, whoever served it. To add a PyTorch release, add a
//! [`TorchRelease`] to [`RELEASES`] and a patch beside the others in `patches/`.

use anyhow::{Result, anyhow, bail};

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

/// Official wheels of a PyTorch release.
pub struct OfficialTorch {
    pub package: PinnedPackage,
    /// Python versions that the release has wheels for, inclusive.
    pub python: ((u32, u32), (u32, u32)),
}

impl OfficialTorch {
    pub fn version(&self) -> &'static str {
        self.package.version
    }
}

/// A PyTorch release that can be given our allocator by a patch.
pub struct TorchRelease {
    pub official: OfficialTorch,
    pub source: PinnedSource,
    /// Our patch, relative to the repository's root.
    pub patch: &'static str,
    /// The CUDA headers this release was built with.
    pub cuda: &'static CudaHeaders,
}

impl TorchRelease {
    pub fn version(&self) -> &'static str {
        self.official.version()
    }
}

/// NVIDIA's packages that together hold the CUDA runtime's headers and library.
pub struct CudaHeaders {
    /// CUDA's major version.
    pub major: u32,
    pub packages: &'static [PinnedPackage],
}

/// The part of an official wheel that the plug-in is compiled and linked against; see [`crate::members`].
pub struct PinnedMembers {
    /// The machine the wheel is for, as `uname -m` calls it.
    pub machine: &'static str,
    /// Over the members' names and bytes ([`crate::members::digest`]).
    pub sha256: &'static str,
}

/// A minor version of PyTorch that the plug-in has a library for.
pub struct PluginRelease {
    /// The release whose headers are compiled against: within a minor version they do not change.
    pub version: &'static str,
    /// The C++ standard that its headers need.
    pub cxx_standard: u32,
    pub cuda: &'static CudaHeaders,
    /// Of the wheels for [`PLUGIN_PYTHON`].
    pub members: &'static [PinnedMembers],
}

impl PluginRelease {
    pub fn members_for(&self, machine: &str) -> Option<&'static PinnedMembers> {
        let members: &'static [PinnedMembers] = self.members;
        members.iter().find(|members| members.machine == machine)
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

/// A release as C++ sees it in `TORCH_UVM_TORCH_VERSION`, and as the plug-in's libraries are named: 206 for 2.6.0.
pub fn version_number(version: &str) -> Result<u32> {
    let mut parts = version.split('.').map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok(major * 100 + minor),
        _ => bail!("«{version}» is no version of PyTorch"),
    }
}

/// The release that commands take when none is named.
pub const DEFAULT_TORCH: &str = "2.6.0";

const fn wheel(python: &'static str, machine: &'static str, sha256: &'static str) -> PinnedWheel {
    PinnedWheel { python, machine, sha256 }
}

const fn members(machine: &'static str, sha256: &'static str) -> PinnedMembers {
    PinnedMembers { machine, sha256 }
}

pub const RELEASES: &[TorchRelease] = &[TorchRelease {
    official: OfficialTorch {
        package: PinnedPackage {
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
        python: ((3, 9), (3, 13)),
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
    cuda: &CUDA_12,
}];

/// The oldest CUDA 12 that PyTorch's wheels of [`PLUGIN_RELEASES`] come with. It serves for the later ones too: within a
/// major version NVIDIA adds to the runtime and takes nothing away (the library's name stays `libcudart.so.12`), and
/// nothing in c10's headers has another layout with a later one.
pub static CUDA_12: CudaHeaders = CudaHeaders {
    major: 12,
    packages: &[
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
};

/// The oldest CUDA 13 that PyTorch's wheels come with; see [`CUDA_12`].
pub static CUDA_13: CudaHeaders = CudaHeaders {
    major: 13,
    packages: &[
        PinnedPackage {
            name: "nvidia-cuda-runtime",
            version: "13.0.96",
            wheels: &[
                wheel("py3", "x86_64", "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"),
                wheel("py3", "aarch64", "ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55"),
            ],
        },
        // crt/
        PinnedPackage {
            name: "nvidia-cuda-crt",
            version: "13.0.88",
            wheels: &[
                wheel("py3", "x86_64", "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4"),
                wheel("py3", "aarch64", "ee2ea2a97073e02ee62bb27841f437332be2c248e3eac013df07997ada39c003"),
            ],
        },
    ],
};

/// The Python whose wheels hold what the plug-in is compiled against. Any would do: `libc10` and its headers know nothing
/// of Python, and every release here has wheels for this one.
pub const PLUGIN_PYTHON: &str = "cp311";

/// Every minor version that the plug-in knows, in order. For aarch64 the package index has CUDA wheels from 2.11 on.
pub const PLUGIN_RELEASES: &[PluginRelease] = &[
    PluginRelease {
        version: "2.6.0",
        cxx_standard: 17,
        cuda: &CUDA_12,
        members: &[members("x86_64", "962edab34a47aa3eca541a59c9701a256907de9f3c6eba89508ded1aa4cd1437")],
    },
    PluginRelease {
        version: "2.7.1",
        cxx_standard: 17,
        cuda: &CUDA_12,
        members: &[members("x86_64", "2b668aa1704f7adf057de9cd4bce6de079bf0615bb4405ae8f64493a07511da0")],
    },
    PluginRelease {
        version: "2.8.0",
        cxx_standard: 17,
        cuda: &CUDA_12,
        members: &[members("x86_64", "0fc26d26e16e91cd3993b7d7a207f347df36a453ddb70471316cf35c204643c4")],
    },
    PluginRelease {
        version: "2.9.1",
        cxx_standard: 17,
        cuda: &CUDA_12,
        members: &[members("x86_64", "9ee2cf5b8f74ff1a8c298a398bb2806be8a22bbebadd296fc9b723c4f60c0ee9")],
    },
    PluginRelease {
        version: "2.10.0",
        cxx_standard: 17,
        cuda: &CUDA_12,
        members: &[members("x86_64", "5f9da3199993dc4114595802cd5281eb8a618c022a7d6599081b6b149eba8eb2")],
    },
    PluginRelease {
        version: "2.11.0",
        cxx_standard: 17,
        cuda: &CUDA_13,
        members: &[
            members("x86_64", "c25ecf227d45a099b8a7a9fc892b8f5323e78bab232829c7159306d23491ea59"),
            members("aarch64", "8e512311b58ee4adf21f7e787d119a459dd394f939f7cca6a2c1a8c27a770332"),
        ],
    },
    PluginRelease {
        version: "2.12.1",
        cxx_standard: 17,
        cuda: &CUDA_13,
        members: &[
            members("x86_64", "563ffee7c1291fb3bc47108908581016c9aeff9750071c21dd63dd3bbec9f4c0"),
            members("aarch64", "cf19ad7ad37da7c61445cbe14d68a22e980d8974b71791d9beb2970046e255c1"),
        ],
    },
    PluginRelease {
        version: "2.13.0",
        cxx_standard: 17,
        cuda: &CUDA_13,
        members: &[
            members("x86_64", "63b779f49916b52a14dd17b64065b093f708a8b6961ea379ef312b67a22a32a7"),
            members("aarch64", "f8c14e986743e3e921dc7af5813242a9d6c59ab9d548edd1a424aefd4ced53fe"),
        ],
    },
    PluginRelease {
        version: "2.14.1",
        cxx_standard: 20,
        cuda: &CUDA_13,
        members: &[
            members("x86_64", "aea22dc181e8a8bf048bbd514e7ce82e2711d7ed41b3abbb502ce543e7e2bcc1"),
            members("aarch64", "3de4116af46590425edb32d90bb619687756d7e9fb58137c542eb62393312d94"),
        ],
    },
    PluginRelease {
        version: "2.15.0",
        cxx_standard: 20,
        cuda: &CUDA_13,
        members: &[
            members("x86_64", "e0c270410b7816c47b2d8c0dfc3f83d759ebe31c80e3bca5f960c348b10da7ea"),
            members("aarch64", "054d79cc096b48b58f392c6f7e4b27efc31c63869da1ca0d35686725abac568e"),
        ],
    },
];

/// The releases that the plug-in is tested with, newest first: official wheels, nothing in them changed. The first is the
/// newest that the package index has, the second one that is not.
pub const PLUGIN_TESTS: &[OfficialTorch] = &[
    OfficialTorch {
        package: PinnedPackage {
            name: "torch",
            version: "2.15.0",
            wheels: &[
                wheel("cp311", "x86_64", "48c2d861134c0b5697c7602cb5ffa68f62a2989fdcd1717e593356f67996ca1e"),
                wheel("cp312", "x86_64", "6d8c86f4e33a9f12a58149bd9b0d64351632b8eb44479be8ff85e5389932dd79"),
                wheel("cp313", "x86_64", "241fea2bac4ed8351307cd13eca5020fbe231f990891be299cf683897caebfbc"),
                wheel("cp314", "x86_64", "1412c79b0338ea61fa31e74a59d74e412c56307e226d3c6e61ccd6d4613ffc3f"),
                wheel("cp315", "x86_64", "fbf74b432a5c1cac0824af3d482ecc64a0a8187a3d58cc6733efe349697daac4"),
                wheel("cp311", "aarch64", "58ce2ebfb3430941353109a85be63ee8e941da22f13daa2c43344eeb51c81e06"),
                wheel("cp312", "aarch64", "9e51cf9460c5441dcd2a4f31ece207e35ea7c3d2535be0f929cca4944e2eeb18"),
                wheel("cp313", "aarch64", "a46cf67c6b574311ecdc24364a5c3a694c60dd3619043f594cfebb8f0b283ea4"),
                wheel("cp314", "aarch64", "59c3a521000ab76a11785276b3d56752e03ca2751658798a94c8f1032f93cf41"),
                wheel("cp315", "aarch64", "eba5772cdce0f92a81d0f5c577ac571a4ee35e052ba7533c2d6dd860f0c5659f"),
            ],
        },
        python: ((3, 11), (3, 15)),
    },
    OfficialTorch {
        package: PinnedPackage {
            name: "torch",
            version: "2.13.0",
            wheels: &[
                wheel("cp310", "x86_64", "c78b7b4d04461855a764cf01bae9a462bb88bc93defcfa11235cbc8fdf3e12c4"),
                wheel("cp311", "x86_64", "60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7"),
                wheel("cp312", "x86_64", "796633c4cdf0fe2cdced72d8f88f22e73dbcfce83132763162f6d4bff13b820b"),
                wheel("cp313", "x86_64", "a3a9a21312872af8a26950b2c15680335a386a1f56ed03e780653d78b9607e9e"),
                wheel("cp314", "x86_64", "49f1ea385c754e54919408a9bb3b5a72b0b755bbe2c916c1d6f70afbec4908a2"),
                wheel("cp310", "aarch64", "0ab4b69f3ee03a62a002cfbf77b1ca5e88aceb4ea64cb4388bb28f638ddbb045"),
                wheel("cp311", "aarch64", "092790c696a760c729fd5722835f50b9d81fd7c8f141571f3f3cf4081a8f664c"),
                wheel("cp312", "aarch64", "572df8be8ffb4599c88cbd6a0726f1f854f4da65d2e3c09f0e2c2283333cd6d4"),
                wheel("cp313", "aarch64", "1e09d6a722504957c694faceca843acde562786df1144ebcc5a74075ec7f6005"),
                wheel("cp314", "aarch64", "a3893dc2da0a972a8ca5d698c85a9f967559ac5f8ee1797b77408aa8734d073c"),
            ],
        },
        python: ((3, 10), (3, 14)),
    },
];

/// What compiles `libc10_cuda` and the plug-in, in a virtual environment of its own, so that neither root nor a recent
/// system is needed.
pub const BUILD_TOOLS: &[&str] = &["cmake==4.4.4", "ninja==1.13.2", "uv==0.13.9"];

/// What checks the Python and the C++.
pub const LINT_TOOLS: &[&str] = &["clang-format==23.1.5", "clang-tidy==23.1.4", "mypy==2.4.1", "ruff==0.17.6"];

/// What changes the sources for the tests to notice.
pub const CARGO_MUTANTS: &str = "27.1.0";

/// What the demo and the tests import beside PyTorch itself.
pub const TEST_PACKAGES: &[&str] =
    &["numpy", "pytest", "expecttest", "hypothesis", "psutil", "ninja", "plotly", "pytest-xdist"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirement_lists_every_checksum() {
        let line = release("2.6.0").unwrap().official.package.requirement();
        assert!(line.starts_with("torch==2.6.0 --hash=sha256:9ea9"));
        assert_eq!(line.matches("--hash=sha256:").count(), 5);
    }

    #[test]
    fn checksums_are_whole() {
        let cuda = [&CUDA_12, &CUDA_13].map(|cuda| cuda.packages);
        let torch = RELEASES.iter().map(|release| &release.official).chain(PLUGIN_TESTS).map(|torch| &torch.package);
        let wheels = cuda.into_iter().flatten().chain(torch).flat_map(|package| package.wheels);
        let sums = wheels.map(|wheel| wheel.sha256).chain(RELEASES.iter().map(|release| release.source.sha256));
        let members = PLUGIN_RELEASES.iter().flat_map(|release| release.members).map(|members| members.sha256);
        for sum in sums.chain(members) {
            assert!(sum.len() == 64 && sum.bytes().all(|c| c.is_ascii_hexdigit()), "{sum}");
        }
    }

    #[test]
    fn plugin_knows_every_minor_version_in_order() {
        let numbers: Vec<_> = PLUGIN_RELEASES.iter().map(|release| version_number(release.version).unwrap()).collect();
        let (first, last) = (numbers[0], numbers[numbers.len() - 1]);
        assert_eq!(numbers, (first..=last).collect::<Vec<_>>());
        assert_eq!((first, last), (206, 215));
    }

    #[test]
    fn plugin_is_tested_with_releases_it_knows() {
        for torch in PLUGIN_TESTS {
            assert!(PLUGIN_RELEASES.iter().any(|release| release.version == torch.version()), "{}", torch.version());
        }
    }

    #[test]
    fn version_number_is_major_and_minor() {
        assert_eq!(version_number("2.6.0").unwrap(), 206);
        assert_eq!(version_number("2.14.1").unwrap(), 214);
        assert!(version_number("nightly").is_err());
    }

    #[test]
    fn unknown_release_names_the_known_ones() {
        let error = release("1.13.0").map(TorchRelease::version).unwrap_err().to_string();
        assert!(error.contains("1.13.0") && error.contains("2.6.0"), "{error}");
    }

    #[test]
    fn wheel_for_matches_python_and_machine() {
        let release = release("2.6.0").unwrap();
        assert!(release.official.package.wheel_for("cp311", "x86_64").is_some());
        assert!(release.official.package.wheel_for("cp38", "x86_64").is_none());
        assert!(release.official.package.wheel_for("cp311", "aarch64").is_none());
        assert!(release.cuda.packages[0].wheel_for("cp311", "x86_64").is_some());
    }
}
