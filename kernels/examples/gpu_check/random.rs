//! Random inputs that can be had again from their seed.

use robocache_types::{Clock, DType, UniformClock};

/// xorshift64*: fast, and good enough to fill buffers.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn from_environment() -> anyhow::Result<Self> {
        let seed = match std::env::var("SEED") {
            Ok(seed) => seed.parse()?,
            Err(_unset) => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
                u64::from(now.subsec_nanos()) + now.as_secs()
            }
        };
        println!("SEED={seed}");
        Ok(Self(seed | 1))
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.bits() >> 33).unwrap_or(0) % end
    }

    pub(crate) fn between(&mut self, low: i64, high: i64) -> i64 {
        low + i64::try_from(self.bits() >> 1).unwrap_or(0) % (high - low)
    }

    /// In `[-1, 1)`.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }

    /// `n` elements; of floating ones, some are any bit pattern (`strange`), NaN and infinities among them.
    pub(crate) fn values(&mut self, dtype: DType, n: usize, strange: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(n * dtype.size_bytes());
        for _ in 0..n {
            let bits = self.bits();
            let scale = 2_f64.powi(i32::from(bits.to_le_bytes()[7] >> 4) - 8);
            let value = self.unit() * scale;
            match dtype {
                _ if strange && bits.is_multiple_of(97) => {
                    bytes.extend(&bits.to_le_bytes()[..dtype.size_bytes()])
                }
                DType::Float16 => bytes.extend(half::f16::from_f64(value).to_le_bytes()),
                DType::BFloat16 => bytes.extend(half::bf16::from_f64(value).to_le_bytes()),
                DType::Float32 => bytes.extend((value as f32).to_le_bytes()),
                DType::Float64 => bytes.extend(value.to_le_bytes()),
                _ => bytes.extend(&bits.to_le_bytes()[..dtype.size_bytes()]),
            }
        }
        bytes
    }

    /// Rows of unit quaternions.
    pub(crate) fn quaternions(&mut self, dtype: DType, rows: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..rows {
            let mut row: [f64; 4] = std::array::from_fn(|_| self.unit());
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-9);
            row = row.map(|x| x / norm);
            for value in row {
                match dtype {
                    DType::Float16 => bytes.extend(half::f16::from_f64(value).to_le_bytes()),
                    DType::BFloat16 => bytes.extend(half::bf16::from_f64(value).to_le_bytes()),
                    DType::Float32 => bytes.extend((value as f32).to_le_bytes()),
                    _ => bytes.extend(value.to_le_bytes()),
                }
            }
        }
        bytes
    }

    /// A clock of `rows` rows: uniform, or with jitter, near doubles and holes.
    pub(crate) fn clock(&mut self, uniform: bool, rows: usize) -> anyhow::Result<Clock> {
        let first = self.between(-10_000_000_000, 10_000_000_000);
        if uniform {
            let hz = [30.0, 50.0, 29.97, 100.0, 997.0, 0.5][self.below(6)];
            return Ok(Clock::Uniform(UniformClock::new(first, hz, rows)?));
        }
        let mut t = first;
        let stamps: Vec<i64> = (0..rows)
            .map(|_| {
                t += match self.below(20) {
                    0 => self.between(1, 3000),
                    1 => self.between(100_000_000, 2_000_000_000),
                    _ => self.between(5_000_000, 15_000_000),
                };
                t
            })
            .collect();
        Ok(Clock::from_stamps(stamps)?)
    }
}
