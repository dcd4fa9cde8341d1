//! The prebuilt GPU code, and which of it a device takes.
//!
//! `images/build.py` makes the files and `manifest.json` (docs/adr/0003-gpu-images.md); this only embeds them. A
//! device takes the image of its own major version with the highest minor version not above its own (NVIDIA's rule
//! for binaries), and PTX where there is none: then its driver compiles, once, while loading.

use std::io::Read as _;

/// The kernels of one source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Assemble,
    Resample,
}

macro_rules! images {
    ($(($major:literal, $minor:literal) => $arch:literal,)*) => {
        /// `(major, minor, name, assemble, resample)`, ascending.
        const BINARIES: &[(u32, u32, &str, &[u8], &[u8])] = &[$((
            $major,
            $minor,
            $arch,
            include_bytes!(concat!("../images/assemble.", $arch, ".cubin.z")),
            include_bytes!(concat!("../images/resample.", $arch, ".cubin.z")),
        ),)*];
    };
}

images! {
    (8, 0) => "sm_80",
    (8, 6) => "sm_86",
    (8, 7) => "sm_87",
    (8, 9) => "sm_89",
    (9, 0) => "sm_90",
    (10, 0) => "sm_100",
    (12, 0) => "sm_120",
}

/// What every device from this on can compile.
const PTX: (u32, u32, &str, &[u8], &[u8]) = (
    8,
    0,
    "compute_80 PTX",
    include_bytes!("../images/assemble.compute_80.ptx.z"),
    include_bytes!("../images/resample.compute_80.ptx.z"),
);

/// An image as `cuModuleLoadData` takes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Image {
    /// Which it is, for messages.
    pub name: &'static str,
    /// Whether its kernels await the grid before them (`await_previous` in cuda/convert.cuh): only then may a launch
    /// overlap it.
    pub awaits: bool,
    assemble: &'static [u8],
    resample: &'static [u8],
}

impl Image {
    /// The image for a device of this compute capability; `None` below 8.0.
    pub(crate) fn for_device(major: u32, minor: u32) -> Option<Self> {
        let binary = BINARIES.iter().rfind(|image| image.0 == major && image.1 <= minor);
        let awaits = binary.is_some_and(|image| image.0 >= 9);
        let (_, _, name, assemble, resample) =
            *binary.or_else(|| Some(&PTX).filter(|ptx| (major, minor) >= (ptx.0, ptx.1)))?;
        Some(Self { name, awaits, assemble, resample })
    }

    /// The bytes, ending in a zero (PTX is text for C).
    pub(crate) fn unpack(&self, source: Source) -> std::io::Result<Vec<u8>> {
        let packed = match source {
            Source::Assemble => self.assemble,
            Source::Resample => self.resample,
        };
        let mut image = Vec::new();
        flate2::read::ZlibDecoder::new(packed).read_to_end(&mut image)?;
        image.push(0);
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_from_8_0_on_has_an_image_that_unpacks() {
        for (major, minor, wanted) in [
            (8, 0, "sm_80"),
            (8, 6, "sm_86"),
            (8, 7, "sm_87"),
            (8, 9, "sm_89"),
            (9, 0, "sm_90"),
            (10, 0, "sm_100"),
            (10, 3, "sm_100"),
            (11, 0, "compute_80 PTX"),
            (12, 1, "sm_120"),
            (13, 0, "compute_80 PTX"),
        ] {
            let image = Image::for_device(major, minor).unwrap();
            assert_eq!(image.name, wanted, "{major}.{minor}");
            for source in [Source::Assemble, Source::Resample] {
                let bytes = image.unpack(source).unwrap();
                let is_elf = bytes.starts_with(b"\x7fELF");
                assert_eq!(is_elf, wanted.starts_with("sm_"), "{wanted}");
                assert!(is_elf || String::from_utf8_lossy(&bytes).contains(".target sm_80"), "{wanted}");
            }
        }
        assert!(Image::for_device(7, 5).is_none());
    }

    #[test]
    fn every_image_has_every_kernel() {
        for image in BINARIES.iter().chain([&PTX]) {
            let image = Image { name: image.2, awaits: false, assemble: image.3, resample: image.4 };
            let has = |source, name: &str| {
                let bytes = image.unpack(source).unwrap();
                bytes.windows(name.len()).any(|window| window == name.as_bytes())
            };
            assert!(has(Source::Assemble, "assemble"), "{}", image.name);
            for (_, value) in crate::fuse::VALUES {
                for (_, time) in crate::fuse::TIMES {
                    for most in crate::fuse::FUSE_STREAMS {
                        let name = format!("resample_{value}_{time}_{most}");
                        assert!(has(Source::Resample, &name), "{} {name}", image.name);
                    }
                }
            }
        }
    }

    #[test]
    fn every_kernel_of_an_image_awaits_the_grid_before_it_or_none_does() {
        // griddepcontrol.wait as sm_90, sm_100 and sm_120 encode it (ACQBULK); instructions are 16 bytes.
        let instruction = 0x782e_u64.to_le_bytes();
        for (major, minor) in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)] {
            let image = Image::for_device(major, minor).unwrap();
            for (source, kernels) in [(Source::Assemble, 1), (Source::Resample, 24)] {
                let code = image.unpack(source).unwrap();
                let found = code.chunks_exact(16).filter(|bytes| bytes[..8] == instruction).count();
                assert_eq!(found, if image.awaits { kernels } else { 0 }, "{}, {source:?}", image.name);
            }
        }
    }
}
