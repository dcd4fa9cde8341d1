//! The kernels against the CPU twin.

use anyhow::{Result, ensure};
use robocache_kernels::{
    Anchor, AssemblePlan, Column, DeviceStream, Field, FieldKernel, FusePlan, FuseStream, FuseTargets,
    Offsets, StreamView, Tensor, Times,
};
use robocache_types::{Clock, DType, Interp};

use crate::gpu::{Buffer, Gpu};
use crate::random::Random;

const FLOATS: [DType; 4] = [DType::Float16, DType::BFloat16, DType::Float32, DType::Float64];
const DIMS: [usize; 9] = [1, 3, 7, 14, 16, 26, 256, 1078, 4096];

/// One column, its two streams and where everything lies on the GPU. Samples take the streams in turn.
struct Case {
    kernel: FieldKernel,
    offsets: Buffer,
    streams: [Stored; 2],
    /// Elements that data and output are shifted by, so that not every address is a round one.
    skew: usize,
    out: Buffer,
    mask: Buffer,
}

struct Stored {
    clock: Clock,
    data: Vec<u8>,
    on_gpu: Buffer,
    stamps: Option<Buffer>,
}

impl Case {
    fn new(gpu: &Gpu, random: &mut Random, field: Field, uniform: bool, batch: usize) -> Result<Self> {
        let kernel = FieldKernel::new(field)?;
        let Field { dim, from, to, interp, .. } = *kernel.field();
        let skew = if random.below(3) == 0 { 1 } else { 0 };
        let mut stored = || -> Result<Stored> {
            let rows = [1, 2, 40, 255, 257, 700][random.below(6)];
            let clock = random.clock(uniform, rows)?;
            let data = match interp {
                Interp::Slerp => random.quaternions(from, rows),
                _ => random.values(from, rows * dim, true),
            };
            let mut shifted = vec![0; skew * from.size_bytes()];
            shifted.extend(&data);
            let stamps = match &clock {
                Clock::Uniform(_) => None,
                Clock::Stamps(stamps) => {
                    Some(gpu.upload(&stamps.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())?)
                }
            };
            Ok(Stored { clock, data, on_gpu: gpu.upload(&shifted)?, stamps })
        };
        let streams = [stored()?, stored()?];
        let (Offsets::Rows(offsets) | Offsets::Times(offsets)) = &kernel.field().offsets;
        let offsets = gpu.upload(&offsets.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())?;
        let out = gpu.buffer(batch * kernel.out_bytes() + skew * to.size_bytes(), 0xa5)?;
        let mask = gpu.buffer(batch * kernel.steps(), 0xa5)?;
        Ok(Self { kernel, offsets, streams, skew, out, mask })
    }

    fn column(&self) -> Column<'_> {
        let out = self.out.at(self.skew * self.kernel.field().to.size_bytes());
        Column { kernel: &self.kernel, offsets: self.offsets.at(0), out, mask: Some(self.mask.at(0)) }
    }

    fn stream(&self, sample: usize) -> DeviceStream<'_> {
        let stored = &self.streams[sample % 2];
        let data = stored.on_gpu.at(self.skew * self.kernel.field().from.size_bytes());
        DeviceStream { data, clock: &stored.clock, stamps: stored.stamps.as_ref().map(|stamps| stamps.at(0)) }
    }

    /// Compares with the twin, and says how many bytes were compared.
    fn check(&self, gpu: &Gpu, anchors: &[Anchor]) -> Result<usize> {
        let field = self.kernel.field();
        let size = self.kernel.out_bytes();
        let got = gpu.download(&self.out, self.skew * field.to.size_bytes(), anchors.len() * size)?;
        let got_mask = gpu.download(&self.mask, 0, anchors.len() * self.kernel.steps())?;
        let (mut wanted, mut mask) = (vec![0x5a; size], vec![0x5a; self.kernel.steps()]);
        for (sample, &anchor) in anchors.iter().enumerate() {
            let stored = &self.streams[sample % 2];
            let stream = StreamView { clock: &stored.clock, data: &stored.data };
            self.kernel.assemble(stream, anchor, &mut wanted, Some(&mut mask));
            let context = || {
                let rows = stored.clock.rows();
                let kind = if matches!(stored.clock, Clock::Uniform(_)) { "uniform" } else { "irregular" };
                format!(
                    "{} -> {}, {:?}, dim {}, {} steps by {}, {kind} clock of {rows} rows, max_gap {:?}, skew {}, sample {sample}",
                    field.from,
                    field.to,
                    field.interp,
                    field.dim,
                    self.kernel.steps(),
                    if matches!(field.offsets, Offsets::Rows(_)) { "rows" } else { "times" },
                    field.max_gap_ns,
                    self.skew,
                )
            };
            ensure!(mask == got_mask[sample * mask.len()..][..mask.len()], "masks differ: {}", context());
            let got = &got[sample * size..][..size];
            let slerp = field.interp == Interp::Slerp;
            if let Some((at, wanted, got)) = first_difference(field.to, &wanted, got, slerp) {
                anyhow::bail!("element {at} is {got:e}, the twin has {wanted:e}: {}", context());
            }
        }
        Ok(anchors.len() * size)
    }
}

fn value(dtype: DType, bytes: &[u8]) -> f64 {
    let mut raw = [0; 8];
    raw[..bytes.len()].copy_from_slice(bytes);
    let bits = u64::from_le_bytes(raw);
    match dtype {
        DType::Float16 => half::f16::from_bits(bits as u16).to_f64_const(),
        DType::BFloat16 => half::bf16::from_bits(bits as u16).to_f64(),
        DType::Float32 => f64::from(f32::from_bits(bits as u32)),
        DType::Float64 => f64::from_bits(bits),
        _ => bits as f64,
    }
}

/// Bit for bit, but any NaN is any other; great circles to an ulp of the dtype and 1e-12.
fn first_difference(dtype: DType, wanted: &[u8], got: &[u8], slerp: bool) -> Option<(usize, f64, f64)> {
    if wanted == got {
        return None;
    }
    let size = dtype.size_bytes();
    let ulp = match dtype {
        DType::Float16 => 2_f64.powi(-10),
        DType::BFloat16 => 2_f64.powi(-7),
        DType::Float32 => 2_f64.powi(-23),
        _ => 0.0,
    };
    wanted.chunks_exact(size).zip(got.chunks_exact(size)).enumerate().find_map(|(at, (wanted, got))| {
        let (a, b) = (value(dtype, wanted), value(dtype, got));
        let same = wanted == got
            || dtype.is_float() && a.is_nan() && b.is_nan()
            || slerp && (a - b).abs() <= 1e-12 + ulp * a.abs().max(b.abs());
        (!same).then_some((at, a, b))
    })
}

fn offsets(random: &mut Random, kind: usize, steps: usize) -> Offsets {
    let steps = i64::try_from(steps).unwrap_or(1);
    match kind {
        0 => Offsets::Rows((-3..steps - 3).collect()),
        1 => Offsets::Rows((0..steps).map(|_| random.between(-60, 800)).collect()),
        2 => Offsets::Times((0..steps).map(|k| k * 20_000_000 - 100_000_000).collect()),
        _ => Offsets::Times((0..steps).map(|_| random.between(-3_000_000_000, 9_000_000_000)).collect()),
    }
}

/// One launch with every dtype, mode, clock and kind of offsets, for each dim.
pub(crate) fn assemble(gpu: &Gpu, random: &mut Random) -> Result<()> {
    let batch = 5;
    let (mut fields, mut bytes) = (0, 0);
    for dim in DIMS {
        let steps = (40_000 / dim).clamp(3, 150);
        let mut wanted = Vec::new();
        for uniform in [false, true] {
            for kind in 0..4 {
                let mut push = |random: &mut Random, interp, from, to, dim| {
                    let max_gap_ns = [None, Some(0), Some(12_000_000), Some(500_000_000)][random.below(4)];
                    let offsets = offsets(random, kind, steps);
                    wanted.push((Field { offsets, interp, max_gap_ns, dim, from, to }, uniform));
                };
                for interp in [Interp::Linear, Interp::Nearest, Interp::Previous] {
                    for from in FLOATS {
                        FLOATS.into_iter().for_each(|to| push(random, interp, from, to, dim));
                    }
                }
                for interp in [Interp::Nearest, Interp::Previous] {
                    let copied = DType::ALL.into_iter().filter(|dtype| !dtype.is_float());
                    copied.for_each(|dtype| push(random, interp, dtype, dtype, dim));
                }
                if dim == 3 {
                    for from in FLOATS {
                        FLOATS.into_iter().for_each(|to| push(random, Interp::Slerp, from, to, 4));
                    }
                }
            }
        }
        let cases = wanted
            .into_iter()
            .map(|(field, uniform)| Case::new(gpu, random, field, uniform, batch))
            .collect::<Result<Vec<_>>>()?;
        // Anchors near the streams' times, on and beside stamps, and beyond the ends.
        let anchors: Vec<Anchor> = (0..batch)
            .map(|_| {
                let clock = &cases[random.below(cases.len())].streams[random.below(2)].clock;
                let t_ns = clock.t_ns(random.below(clock.rows())) + random.between(-1500, 1500);
                Anchor { t_ns, row: random.between(-5, 300) }
            })
            .collect();
        launch(gpu, &cases, &anchors)?;
        for case in &cases {
            bytes += case.check(gpu, &anchors)?;
        }
        // Again over another poison: the same bits, so nothing depends on order or on what was there.
        let before = cases
            .iter()
            .map(|case| gpu.download(&case.out, 0, batch * case.kernel.out_bytes()))
            .collect::<Result<Vec<_>>>()?;
        launch(gpu, &cases, &anchors)?;
        for (case, before) in cases.iter().zip(before) {
            let again = gpu.download(&case.out, 0, batch * case.kernel.out_bytes())?;
            ensure!(again == before, "two runs differ, dim {dim}");
        }
        fields += cases.len();
    }
    println!("assemble: {fields} fields in {} launches agree with the twin, {bytes} bytes", DIMS.len());
    Ok(())
}

fn launch(gpu: &Gpu, cases: &[Case], anchors: &[Anchor]) -> Result<()> {
    let columns: Vec<Column<'_>> = cases.iter().map(Case::column).collect();
    let plan = AssemblePlan::new(&columns, anchors.len(), gpu.multiprocessors())?;
    let (mut sources, mut anchor_bytes) = (Vec::new(), Vec::new());
    for case in cases {
        (0..anchors.len()).try_for_each(|sample| case.stream(sample).encode(&mut sources))?;
    }
    anchors.iter().for_each(|anchor| anchor.encode(&mut anchor_bytes));
    let (fields, sources, anchors) =
        (gpu.upload(plan.fields())?, gpu.upload(&sources)?, gpu.upload(&anchor_bytes)?);
    gpu.assemble(&plan, &fields, &sources, &anchors)?;
    gpu.download(&anchors, 0, 0)?; // waits, so that the arguments may go
    Ok(())
}

/// More than 2^31 elements, and a clock of 10^6 stamps, by samples drawn from the result.
pub(crate) fn large(gpu: &Gpu, random: &mut Random) -> Result<()> {
    let (dim, steps, batch, rows) = (4096, 1024, 520, 1_000_000);
    let clock = random.clock(false, rows)?;
    let small = Clock::from_stamps((0..700).map(|row| clock.t_ns(row)).collect::<Vec<_>>())?;
    for (dim, batch, clock) in [(dim, batch, &small), (8, 64, &clock)] {
        let offsets = Offsets::Times((0..steps).map(|k| k * 3_000_000).collect());
        let (interp, max_gap_ns, from, to) = (Interp::Linear, None, DType::BFloat16, DType::BFloat16);
        let kernel = FieldKernel::new(Field { offsets, interp, max_gap_ns, dim, from, to })?;
        let data = random.values(from, clock.rows() * dim, false);
        let stamps: Vec<u8> = (0..clock.rows()).flat_map(|row| clock.t_ns(row).to_le_bytes()).collect();
        let anchors: Vec<Anchor> =
            (0..batch).map(|_| Anchor { t_ns: clock.t_ns(random.below(clock.rows())), row: 0 }).collect();
        let Offsets::Times(offsets) = &kernel.field().offsets else { anyhow::bail!("times were given") };
        let offsets = gpu.upload(&offsets.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())?;
        let (out, mask) =
            (gpu.buffer(batch * kernel.out_bytes(), 0xa5)?, gpu.buffer(batch * kernel.steps(), 0xa5)?);
        let column =
            Column { kernel: &kernel, offsets: offsets.at(0), out: out.at(0), mask: Some(mask.at(0)) };
        let plan = AssemblePlan::new(&[column], batch, gpu.multiprocessors())?;
        let (data_on_gpu, stamps) = (gpu.upload(&data)?, gpu.upload(&stamps)?);
        let (mut sources, mut anchor_bytes) = (Vec::new(), Vec::new());
        for anchor in &anchors {
            DeviceStream { data: data_on_gpu.at(0), clock, stamps: Some(stamps.at(0)) }
                .encode(&mut sources)?;
            anchor.encode(&mut anchor_bytes);
        }
        let (fields, sources, on_gpu) =
            (gpu.upload(plan.fields())?, gpu.upload(&sources)?, gpu.upload(&anchor_bytes)?);
        gpu.assemble(&plan, &fields, &sources, &on_gpu)?;
        let (mut wanted, mut wanted_mask) = (vec![0; kernel.out_bytes()], vec![0; kernel.steps()]);
        for sample in [0, batch / 2, batch - 1, random.below(batch)] {
            let stream = StreamView { clock, data: &data };
            kernel.assemble(stream, anchors[sample], &mut wanted, Some(&mut wanted_mask));
            let got = gpu.download(&out, sample * wanted.len(), wanted.len())?;
            let got_mask = gpu.download(&mask, sample * wanted_mask.len(), wanted_mask.len())?;
            ensure!(got_mask == wanted_mask, "masks differ, large, sample {sample}");
            if let Some((at, wanted, got)) = first_difference(to, &wanted, &got, false) {
                anyhow::bail!("large, sample {sample}, element {at} is {got:e}, the twin has {wanted:e}");
            }
        }
        let elements = batch * kernel.steps() * dim;
        println!(
            "assemble: {elements} elements from {} rows agree with the twin where sampled",
            clock.rows()
        );
    }
    Ok(())
}

fn times(random: &mut Random, dtype: DType, n: usize, batch: usize, ascending: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A tile with a NaN target takes another path: not every call may have one.
    let nan = !ascending && random.below(3) == 0;
    for _ in 0..batch {
        let mut t = -20;
        for _ in 0..n {
            t = if ascending { t + random.between(0, 5) } else { random.between(-50, 900) };
            match dtype {
                DType::Float32 if nan && random.below(50) == 0 => bytes.extend(f32::NAN.to_le_bytes()),
                DType::Float32 => bytes
                    .extend((t as f32 + 0.25 * random.below(4) as f32 * f32::from(!ascending)).to_le_bytes()),
                DType::Float64 if nan && random.below(50) == 0 => bytes.extend(f64::NAN.to_le_bytes()),
                DType::Float64 => bytes.extend((t as f64).to_le_bytes()),
                _ => bytes.extend(t.to_le_bytes()),
            }
        }
    }
    bytes
}

/// `resample` and `fuse`, of 1 to 12 streams, for each pair of dtypes.
pub(crate) fn fuse(gpu: &Gpu, random: &mut Random) -> Result<()> {
    let batch = 4;
    let mut count = 0;
    for values in FLOATS {
        for time in [DType::Float32, DType::Float64, DType::Int64] {
            for streams in [1, 1, 3, 12] {
                for dim in DIMS {
                    let steps = (20_000 / dim).clamp(3, 150);
                    let dims: Vec<usize> =
                        (0..streams).map(|k| if k == 0 { dim } else { DIMS[random.below(7)] }).collect();
                    let rows: Vec<usize> =
                        dims.iter().map(|_| [1, 2, 30, 511, 513, 1500][random.below(6)]).collect();
                    let data: Vec<Vec<u8>> = dims
                        .iter()
                        .zip(&rows)
                        .map(|(d, r)| random.values(values, batch * r * d, true))
                        .collect();
                    let stamps: Vec<Vec<u8>> =
                        rows.iter().map(|&r| times(random, time, r, batch, true)).collect();
                    let targets = times(random, time, steps, batch, false);
                    let width: usize = dims.iter().sum();
                    let len = batch * steps * width * values.size_bytes();
                    let tensors: Vec<(Tensor<'_>, Times<'_>)> = (0..streams)
                        .map(|k| {
                            let src =
                                Tensor { dtype: values, shape: [batch, rows[k], dims[k]], data: &data[k] };
                            (src, Times { dtype: time, shape: [batch, rows[k]], data: &stamps[k] })
                        })
                        .collect();
                    let mut wanted = vec![0x5a; len];
                    let times_tgt = Times { dtype: time, shape: [batch, steps], data: &targets };
                    robocache_kernels::fuse(&tensors, times_tgt, &mut wanted)?;

                    let out = gpu.buffer(len, 0xa5)?;
                    let on_gpu: Vec<(Buffer, Buffer)> = data
                        .iter()
                        .zip(&stamps)
                        .map(|(data, stamps)| Ok((gpu.upload(data)?, gpu.upload(stamps)?)))
                        .collect::<Result<_>>()?;
                    let targets = gpu.upload(&targets)?;
                    let described: Vec<FuseStream> = (0..streams)
                        .map(|k| FuseStream {
                            src: on_gpu[k].0.at(0),
                            times: on_gpu[k].1.at(0),
                            rows: rows[k],
                            dim: dims[k],
                        })
                        .collect();
                    let (targets, into) = (targets.at(0), out.at(0));
                    let onto = FuseTargets { out: into, targets, batch, steps, values, times: time };
                    let plan = FusePlan::new(&described, onto, gpu.multiprocessors())?;
                    gpu.fuse(&plan)?;
                    let got = gpu.download(&out, 0, len)?;
                    if let Some((at, wanted, got)) = first_difference(values, &wanted, &got, false) {
                        anyhow::bail!(
                            "fuse of dims {dims:?}, rows {rows:?}, {steps} steps, {values} at {time} times: element {at} \
                             (column {} of {width}) is {got:e}, the twin has {wanted:e}",
                            at % width
                        );
                    }
                    count += 1;
                }
            }
        }
    }
    println!("resample and fuse: {count} fusions agree with the twin");
    Ok(())
}
